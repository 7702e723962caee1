"""The scores that `evaluate` gave the checkpoints of a run, as columns beside its validations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.scaling.run_records import Report, read_reports

FOLDER = "evaluations"
"""In the directory of a run: all that `evaluate` wrote there is read."""

Scores = Mapping[str, float]
"""Column -> value."""

_CHECKPOINT = re.compile(r"iter_\d+")
_PLACE = ("step", "tokens", "epoch")
_GAPS = {
    "delta_nll": "nats",
    "delta_nll_stderr": "standard_error",
    "delta_nll_per_byte": "nats_per_byte",
    "delta_nll_per_byte_stderr": "nats_per_byte_standard_error",
}
_LOSSES = {
    "nelbo": "nats_per_token",
    "nelbo_stderr": "standard_error",
    "bits_per_byte": "bits_per_byte",
    "bits_per_byte_stderr": "bits_per_byte_standard_error",
}


def with_evaluations(reports: Iterable[Report], run: Path, warnings: list[str]) -> Iterable[Report]:
    """The validations of a run, by step, with the scores of its evaluated checkpoints.

    A checkpoint of a step without validation becomes a report of its own, whose place in the data
    is that of the training report of this step.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return reports
    found = _read_evaluations(folder, warnings)
    joined = [
        {**report, **found.get(report["step"], {})} if report["split"] == "valid" else report
        for report in reports
    ]
    validated = {report["step"] for report in joined if report["split"] == "valid"}
    alone = {step: scores for step, scores in found.items() if step not in validated}
    joined += _without_validation(alone, run, warnings)
    return sorted(joined, key=lambda report: report["step"])


def _without_validation(
    found: Mapping[int, Scores], run: Path, warnings: list[str]
) -> Iterator[dict[str, Any]]:
    if not found:
        return
    places = {report["step"]: report for report in read_reports(run / "metrics.jsonl", "train", [])}
    for step, scores in found.items():
        if step in places:
            place = {name: places[step].get(name) for name in _PLACE}
            yield {"split": "valid", **place, **scores}
    lost = sorted(found.keys() - places.keys())
    if lost:
        warnings.append(
            f"{run.name}: left out evaluations at step {', '.join(map(str, lost))}, where "
            "metrics.jsonl has no report; save at steps of validation.interval_steps"
        )


def _read_evaluations(folder: Path, warnings: list[str]) -> dict[int, dict[str, float]]:
    """Step -> the scores of all reports under the folder."""
    found: dict[int, dict[str, float]] = {}
    run = folder.parent.name
    for path in sorted([*folder.rglob("data.json"), *folder.rglob("tasks.json")]):
        shown = path.relative_to(folder.parent)
        try:
            report = parse_json(path.read_bytes())
            step = report["step"]
            scores = dict(_of_tasks(report) if path.name == "tasks.json" else _of_data(report))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warnings.append(f"{run}: {shown} is no report of `evaluate` and was left out")
            continue
        if type(step) is not int:
            warnings.append(f"{run}: {shown} is not of a checkpoint and was left out")
            continue
        parts = path.relative_to(folder).parent.parts
        prefix = "".join(f"{part}/" for part in parts if not _CHECKPOINT.fullmatch(part))
        columns = found.setdefault(step, {})
        twice = [name for name in scores if f"{prefix}{name}" in columns]
        if twice:
            warnings.append(
                f"{run}: {shown} has {prefix}{twice[0]} of step {step} once more and was left out; "
                "give evaluations of other settings a folder with a name"
            )
            continue
        columns.update((f"{prefix}{name}", value) for name, value in scores.items())
    return found


def _of_tasks(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """TASK/METRIC, and its filter where lm-eval used one; parts of a group are in its own score."""
    groups: Mapping[str, Sequence[str]] = report["lm_eval"].get("group_subtasks", {})
    results = report["results"]
    parts = {
        task for group, tasks in groups.items() if _has_scores(results, group) for task in tasks
    }
    for task, values in results.items():
        if task in parts:
            continue
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if rule and _is_number(value):
                yield "/".join((task, metric, *([] if rule == "none" else [rule]))), value
    for task, delta in report["delta_nll"].items():
        if task not in parts:
            yield from _named(task, _GAPS, delta)


def _of_data(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """DATASET/nelbo, of AR exact, and DATASET/bits_per_byte; the dataset by its last name."""
    scores = report["data"]
    names = [Path(score["prefix"]).name for score in scores]
    for score, name in zip(scores, names, strict=True):
        short = name if names.count(name) == 1 else score["prefix"]
        yield from _named(short, _LOSSES, score)


def _named(
    where: str, columns: Mapping[str, str], report: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    for name, key in columns.items():
        if _is_number(report[key]):
            yield f"{where}/{name}", report[key]


def _has_scores(results: Mapping[str, Mapping[str, Any]], group: str) -> bool:
    return any(_is_number(value) for value in results.get(group, {}).values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
