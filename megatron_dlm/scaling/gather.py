"""The reports of all runs of a study as one tidy table: a row for every report of every run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.keys import is_list, is_mapping, leaf_types
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.scaling.contradictions import SECTIONS, Contradictions
from megatron_dlm.scaling.flops import table_facts
from megatron_dlm.scaling.run_evaluations import with_evaluations
from megatron_dlm.scaling.run_records import (
    Report,
    read_config,
    read_facts,
    read_reports,
    section_from,
    settings_in,
)
from megatron_dlm.scaling.study import Study, StudyRun
from megatron_dlm.scaling.study_parts import COLUMNS_OF_RUNS

if TYPE_CHECKING:
    import pyarrow

_FACTS = {
    "num_parameters": "int64",
    "training_flops_per_token": "double",
    "unique_tokens": "int64",
    "commit": "string",
    "uncommitted_changes": "bool",
}
"""Of run.json, beside every row: what the numbers belong to."""
_DERIVED = {
    "num_parameters_without_embeddings": "int64",
    "flops_per_token_six_n": "double",
    "flops_per_token_six_p_and_attention": "double",
}
"""Of the sections model and objective of config.yaml: scaling/flops.py."""
_PLACE = {
    "step": "int64",
    "split": "string",
    "tokens": "int64",
    "training_flops": "double",
    "epoch": "double",
}
"""Of a report; training_flops is tokens x training_flops_per_token."""
_FIRST_METRICS = ("nelbo", "loss")
_SEEN = "unique_tokens"  # in a report those seen so far, in run.json those there are
assert set(COLUMNS_OF_RUNS) == {"study", "run", *_FACTS, *_DERIVED, *_PLACE}


@dataclass
class Gathered:
    """The table, and what was met on the way."""

    table: pyarrow.Table
    num_runs: int
    """Runs that have reported anything."""
    warnings: list[str]
    """What could not be read, or contradicts the study, in words; runs are named first."""


@dataclass
class _Columns:
    """The reports of all runs, column by column, shorter ones to be filled up with None."""

    num_rows: int = 0
    values: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        for name, value in report.items():
            column = self.values.setdefault(name, [])
            missing = self.num_rows - len(column)
            if missing:
                column.extend([None] * missing)
            column.append(value)
        self.num_rows += 1

    def whole(self, name: str) -> list[Any]:
        column = self.values.get(name, [])
        return column + [None] * (self.num_rows - len(column))


def gather(study: Study, runs_folder: Path, *, split: str) -> Gathered:
    """The table of all reports under runs_folder/<name of the run>/; split: valid, train or all.

    Columns: study, run, the axes (labels), the scalar settings that an axis changes (the value of
    the run's own config.yaml), facts of run.json, the place of the report, then its metrics: nelbo,
    loss, the others by name, then what `evaluate` found for its checkpoints (TASK/METRIC). A metric
    with the name of an axis gets `reported_` in front.
    """
    columns, reader = _Columns(), _RunReader(study, runs_folder)
    counts: list[int] = []
    fixed: list[dict[str, Any]] = []
    for run in study.runs:
        path = runs_folder / run.name
        before = columns.num_rows
        reports: Iterable[Report] = read_reports(path / "metrics.jsonl", split, reader.warnings)
        if split != "train":
            reports = with_evaluations(reports, path, reader.warnings)
        for report in reports:
            columns.add(report)
        if columns.num_rows > before:
            counts.append(columns.num_rows - before)
            fixed.append(reader.read(run, path))
    table = _table(study, columns, counts, fixed)
    return Gathered(table, len(counts), reader.all_warnings())


class _RunReader:
    """What is the same in all rows of a run."""

    def __init__(self, study: Study, runs_folder: Path) -> None:
        self.warnings: list[str] = []
        self._study = study
        self._sections = {key.partition(".")[0] for key in study.settings} | SECTIONS
        self._contradictions = Contradictions(study, runs_folder)
        # Most runs of a study have their model and objective in common.
        self._derived: dict[str, dict[str, float]] = {}

    def read(self, run: StudyRun, path: Path) -> dict[str, Any]:
        """Column -> value; adds to the warnings what is wrong with the run's files."""
        facts = read_facts(path / "run.json", self.warnings)
        config = read_config(path / "config.yaml", self._sections, self.warnings)
        settings = settings_in(config, self._study.settings)
        self._contradictions.add_config(run, config)
        # Only these facts: others may have the name of an axis.
        found = {name: facts.get(name) for name in _FACTS} | self._derive(run, config)
        return {"study": self._study.name, "run": run.name, **run.labels, **settings, **found}

    def all_warnings(self) -> list[str]:
        """Those of the files, and where they contradict the study."""
        return [*self.warnings, *self._contradictions.lines()]

    def _derive(self, run: StudyRun, config: Mapping[str, Any]) -> dict[str, float]:
        if "model" not in config or "objective" not in config:
            return {}
        key = repr((config["model"], config["objective"]))
        if key not in self._derived:
            try:
                model = section_from(ModelConfig, config["model"])
                objective = section_from(ObjectiveConfig, config["objective"])
                self._derived[key] = table_facts(model, objective)
            except (TypeError, ValueError) as error:
                self.warnings.append(f"{run.name}: its config.yaml is of another version: {error}")
                self._derived[key] = {}
        return self._derived[key]


def _table(
    study: Study, columns: _Columns, counts: Sequence[int], fixed: Sequence[Mapping[str, Any]]
) -> pyarrow.Table:
    import numpy as np
    import pyarrow
    import pyarrow.compute

    rows = pyarrow.array(np.repeat(np.arange(len(counts)), counts))
    found: dict[str, pyarrow.Array] = {}
    for name, kind in _kinds_of_runs(study).items():
        of_runs = _array([one.get(name) for one in fixed], kind)
        found[name] = of_runs.take(rows)
    for name, kind in _PLACE.items():
        found[name] = _array(columns.whole(name), kind)
    found["training_flops"] = pyarrow.compute.multiply(
        found["tokens"].cast("double"), found["training_flops_per_token"]
    )
    for name in _metrics(columns):
        shown = f"seen_{name}" if name.partition("/")[0] == _SEEN else name
        shown = f"reported_{shown}" if shown in study.axes else shown
        found[shown] = _array(columns.whole(name), "double")
    return pyarrow.table(found)


def _kinds_of_runs(study: Study) -> dict[str, str]:
    """Column -> type of what is the same in all rows of a run."""
    names = dict.fromkeys(("study", "run", *study.axes), "string")
    settings = {key: kind for key in study.settings if (kind := _kind_of_setting(key))}
    return {**names, **settings, **_FACTS, **_DERIVED}


@cache
def _kinds_of_keys() -> Mapping[str, Any]:
    return leaf_types(RunConfig)


def _kind_of_setting(key: str) -> str | None:
    """The type of a setting's column; lists and mappings have none."""
    annotation = _kinds_of_keys().get(key)
    if annotation is None:
        return None
    if get_origin(annotation) in (Union, UnionType):
        members = [one for one in get_args(annotation) if one is not type(None)]
        annotation = members[0] if len(members) == 1 else str
    if is_list(annotation) or is_mapping(annotation):
        return None
    return {bool: "bool", int: "int64", float: "double"}.get(annotation, "string")


def _metrics(columns: _Columns) -> Iterator[str]:
    names = columns.values.keys() - _PLACE.keys()
    yield from (name for name in _FIRST_METRICS if name in names)
    yield from sorted(names - set(_FIRST_METRICS))


def _array(values: list[Any], kind: str) -> pyarrow.Array:
    """A column; what is not of its type becomes null."""
    import pyarrow

    # pyarrow would make 1 of 1.5.
    if kind != "int64" or not any(isinstance(value, float) for value in values):
        try:
            return pyarrow.array(values, type=kind)
        except (pyarrow.ArrowException, OverflowError):
            pass
    return pyarrow.array([_as(value, kind) for value in values], type=kind)


def _as(value: Any, kind: str) -> Any:
    """The value as a column of this type holds it; None where it cannot."""
    if kind in ("string", "bool"):
        return value if isinstance(value, {"string": str, "bool": bool}[kind]) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        if kind == "double":
            return float(value)
        whole = int(value)
    except (OverflowError, ValueError):  # too large, infinite, or no number
        return None
    return whole if whole == value and -(2**63) <= whole < 2**63 else None
