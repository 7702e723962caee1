"""A line for every run of a study: its labels, how far it is, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.scaling.results import Results, Row, number
from megatron_dlm.scaling.run_state import RunState, state_of
from megatron_dlm.scaling.study import Study
from megatron_dlm.scaling.study_results import run_folder

_METRIC = "nelbo"


@dataclass(frozen=True)
class RunLine:
    """One run of the page; empty texts for what is not known."""

    name: str
    labels: Mapping[str, str]
    state: str
    reason: str
    step: int | None
    tokens: int | None
    best: float | None
    """Lowest validation NELBO (the NLL of AR), and the epoch of it."""
    best_epoch: float | None
    last: float | None
    folder: str | None
    """Link to the folder of the run, relative to the page; None where it is not there."""
    report: str | None
    """Link to its report.html."""


def run_lines(study: Study, results: Results, folder: Path) -> list[RunLine]:
    """All runs in the order of the study, also those that have not reported."""
    reported = results.runs()
    lines = []
    for run in study.runs:
        place = run_folder(folder, run)
        link = place.relative_to(folder).as_posix() if place.is_dir() else None
        found = state_of(place) if link else RunState("")
        rows = reported.get(run.name, ())
        scored = [row for row in rows if number(row, _METRIC) is not None]
        best = min(scored, key=lambda row: row[_METRIC]) if scored else None
        has_report = link is not None and (place / "report.html").is_file()
        lines.append(
            RunLine(
                name=run.name,
                labels=run.labels,
                state=found.state or ("reported" if rows else "not begun"),
                reason=found.reason,
                step=rows[-1]["step"] if rows else found.step,
                tokens=rows[-1].get("tokens") if rows else None,
                best=None if best is None else number(best, _METRIC),
                best_epoch=None if best is None else number(best, "epoch"),
                last=number(scored[-1], _METRIC) if scored else None,
                folder=link,
                report=f"{link}/report.html" if has_report else None,
            )
        )
    return lines


def commits(rows: Sequence[Row]) -> dict[str, int]:
    """Commit, with a word where it had uncommitted changes -> number of runs made from it."""
    of_runs = {row["run"]: row for row in rows}
    counts: dict[str, int] = {}
    for row in of_runs.values():
        name = str(row.get("commit") or "unknown")[:12]
        if row.get("uncommitted_changes"):
            name += " with uncommitted changes"
        counts[name] = counts.get(name, 0) + 1
    return counts
