"""`study status` and `study gather`: how far the runs are, and one tidy table of their reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.study_commands import StudyGatherConfig, StudyStatusConfig
from megatron_dlm.scaling.gather import Gathered, gather
from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.training.status import read_status

if TYPE_CHECKING:
    import pyarrow


def run_folder(study_folder: Path, run: StudyRun) -> Path:
    """Where a run of a study lies."""
    return study_folder / "runs" / run.name


def state_of(study_folder: Path, run: StudyRun) -> tuple[str, int | None, str]:
    """State, step and reason of a run, of its status.json."""
    status = read_status(run_folder(study_folder, run))
    return (
        ("not begun", None, "")
        if status is None
        else (status.state, status.step, status.reason or "")
    )


def status_study(config: StudyStatusConfig) -> None:
    """Print a line for every run."""
    study = read_study(Path(config.study))
    table = Table(title=study.name)
    for column in ("run", "state", "step", "reason"):
        table.add_column(column)
    counts: dict[str, int] = {}
    for run in study.runs:
        state, step, reason = state_of(Path(config.output_dir), run)
        counts[state] = counts.get(state, 0) + 1
        table.add_row(run.name, state, "" if step is None else str(step), reason)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def gather_study(config: StudyGatherConfig) -> None:
    """Write the table; raises ValueError where no run of the study has reported anything."""
    folder = Path(config.output_dir)
    output = folder / "results.csv" if config.output is None else Path(config.output)
    study = read_study(Path(config.study))
    gathered = gather_runs(study, folder, split=config.split)
    write_table(gathered.table, output)
    for warning in gathered.warnings:
        print(f"warning: {warning}")
    print(
        f"{output}: {gathered.table.num_rows} rows of {gathered.num_runs} of {len(study.runs)} runs"
    )


def gather_runs(study: Study, folder: Path, *, split: str = "valid") -> Gathered:
    """The tidy table of the runs in a study's folder; ValueError where there are no reports."""
    gathered = gather(study, folder / "runs", split=split)
    if not gathered.num_runs:
        raise ValueError(f"{folder}: no run of {study.name} has reported anything; run it first")
    return gathered


def write_table(table: pyarrow.Table, output: Path) -> None:
    """.csv or .parquet, there whole or not at all."""
    import pyarrow.csv
    import pyarrow.parquet

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".csv":
        pyarrow.csv.write_csv(table, temporary)
    else:
        pyarrow.parquet.write_table(table, temporary)
    temporary.replace(output)
