"""`study status` and `study gather`: how far the runs are, and one tidy table of their reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dlm.config.study_commands import StudyGatherConfig, StudyStatusConfig
from megatron_dlm.scaling.contradictions import contradictions_of
from megatron_dlm.scaling.gather import Gathered, gather
from megatron_dlm.scaling.run_state import state_of
from megatron_dlm.scaling.study import Study, StudyRun, read_study

if TYPE_CHECKING:
    import pyarrow


_MOST_NAMES = 6


def run_folder(study_folder: Path, run: StudyRun) -> Path:
    """Where a run of a study lies."""
    return study_folder / "runs" / run.name


def make_folder(folder: Path, name: str = "output_dir") -> None:
    """Raises ValueError, which names the flag and the folder, where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{name} {folder} cannot be made ({error.strerror}); choose another"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {folder} is not writable; choose another")


def status_study(config: StudyStatusConfig) -> None:
    """Print a line for every run, and where runs are not those of the study."""
    study = read_study(Path(config.study))
    folder = Path(config.output_dir)
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} does not exist; `study run` makes it")
    table = Table(title=study.name)
    for column in ("run", "state", "step", "reason"):
        table.add_column(column)
    counts: dict[str, int] = {}
    for run in study.runs:
        found = state_of(run_folder(folder, run))
        counts[found.state] = counts.get(found.state, 0) + 1
        step = "" if found.step is None else str(found.step)
        table.add_row(run.name, found.state, step, escape(found.reason))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    for warning in contradictions_of(study, study.runs, folder / "runs"):
        print(f"warning: {warning}")


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
        failed = [run.name for run in study.runs if state_of(run_folder(folder, run)).is_failure]
        names = ", ".join(failed[:_MOST_NAMES]) + (" ..." if len(failed) > _MOST_NAMES else "")
        why = f"failed: {names} (`study status` says why)" if failed else "run it first"
        raise ValueError(f"{folder}: no run of {study.name} has reported anything; {why}")
    return gathered


def write_table(table: pyarrow.Table, output: Path) -> None:
    """.csv or .parquet, there whole or not at all."""
    import pyarrow.csv
    import pyarrow.parquet

    make_folder(output.parent, "the folder of output")
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".csv":
        pyarrow.csv.write_csv(table, temporary)
    else:
        pyarrow.parquet.write_table(table, temporary)
    temporary.replace(output)
