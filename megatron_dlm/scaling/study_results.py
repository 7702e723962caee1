"""`study status` and `study gather`: how far the runs are, and one tidy table of their reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from megatron_dlm.config.study_commands import StudyGatherConfig, StudyStatusConfig
from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.training.status import read_status

_FACTS = ("num_parameters", "training_flops_per_token", "unique_tokens", "commit")
"""Of run.json, beside every row: what the numbers belong to."""


def run_folder(study_folder: Path, run: StudyRun) -> Path:
    """Where a run of a study lies."""
    return study_folder / "runs" / run.name


def status_study(config: StudyStatusConfig) -> None:
    """Print a line for every run."""
    study = read_study(Path(config.study))
    table = Table(title=study.name)
    for column in ("run", "state", "step", "reason"):
        table.add_column(column)
    counts: dict[str, int] = {}
    for run in study.runs:
        status = read_status(run_folder(Path(config.output_dir), run))
        state = "not begun" if status is None else status.state
        counts[state] = counts.get(state, 0) + 1
        if status is None:
            table.add_row(run.name, state, "", "")
        else:
            table.add_row(run.name, state, str(status.step), status.reason or "")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def gather_study(config: StudyGatherConfig) -> None:
    """Write the table; raises ValueError where no run of the study has reported anything."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    rows = list(tidy_rows(study, folder, split=config.split))
    if not rows:
        raise ValueError(f"{folder}: no run of {study.name} has reported anything; run it first")
    table = pyarrow.Table.from_pylist(rows, schema=_schema(study, rows))
    output = folder / "results.csv" if config.output is None else Path(config.output)
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".csv":
        pyarrow.csv.write_csv(table, temporary)
    else:
        pyarrow.parquet.write_table(table, temporary)
    temporary.replace(output)
    runs = len({row["run"] for row in rows})
    print(f"{output}: {len(rows)} rows of {runs} of {len(study.runs)} runs")


def tidy_rows(study: Study, folder: Path, *, split: str) -> Iterator[dict[str, Any]]:
    """study, run, its labels, facts of run.json, then step, split and every metric of a report."""
    for run in study.runs:
        path = run_folder(folder, run)
        facts = _facts(path)
        for entry in _reports(path / "metrics.jsonl"):
            if split in ("all", entry["split"]):
                yield {"study": study.name, "run": run.name, **run.labels, **facts, **entry}


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: facts[name] for name in _FACTS if name in facts}


def _reports(path: Path) -> Iterator[Mapping[str, Any]]:
    """Whole lines; the last one may still be being written."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "split" in entry and "step" in entry:
            yield entry


def _schema(study: Study, rows: list[dict[str, Any]]) -> Any:
    """Text for what names a run, whole numbers for counts, else numbers; columns as they come."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    text = {"study", "run", "split", "commit", *study.axes}
    whole = {"step", "tokens", "num_parameters", "unique_tokens"}
    kinds = {name: pyarrow.string() if name in text else pyarrow.float64() for name in names} | {
        name: pyarrow.int64() for name in names if name in whole
    }
    return pyarrow.schema([(name, kinds[name]) for name in names])
