"""The tidy table of a study: what every figure and every fit reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.scaling.crossings import Curve

Row = Mapping[str, Any]
"""Column -> value; None where a run has none."""

_REQUIRED = ("study", "run", "step", "split")
_NUMBERS = ("step", "tokens", "training_flops", "epoch", "nelbo", "loss")
_ALWAYS_TEXT = ("study", "run", "split", "commit")


@dataclass(frozen=True)
class Results:
    """Rows of one or several tables: a row for every report of every run."""

    rows: tuple[Row, ...]
    source: str = "the results"
    """Where they come from, for messages."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that a row has, in their order."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def runs(self) -> dict[str, tuple[Row, ...]]:
        """Run -> its validations by step; of a step that was reported twice, the later report.

        A run is named by its study too where the rows come from several studies. A run that has
        not validated is left out.
        """
        has_several = len({row["study"] for row in self.rows}) > 1
        found: dict[str, dict[int, Row]] = {}
        for row in self.rows:
            if row["split"] == "valid":
                name = f"{row['study']}/{row['run']}" if has_several else str(row["run"])
                found.setdefault(name, {})[row["step"]] = row
        return {name: tuple(steps[step] for step in sorted(steps)) for name, steps in found.items()}

    def check_columns(self, *names: str) -> None:
        """Raise ValueError, which names the table, for a column that no row has a value in."""
        for name in names:
            if not any(row.get(name) is not None for row in self.rows):
                remedy = ""
                if "/" in name:
                    remedy = "scores of tasks come from `evaluate --every_checkpoint true`; "
                have = ", ".join(self.columns)
                raise ValueError(
                    f"{self.source}: no row has a value of {name}; {remedy}have: {have}"
                )


def curve_of(rows: Sequence[Row], x: str, metric: str) -> Curve | None:
    """The metric of one run against a column; None where fewer than two reports have both.

    Reports without a finite value, and reports whose x is not above that of the one before, are
    left out.
    """
    points: list[tuple[float, float]] = []
    for row in rows:
        place, value = number(row, x), number(row, metric)
        if place is None or value is None or (points and place <= points[-1][0]):
            continue
        points.append((place, value))
    if len(points) < 2:
        return None
    xs, ys = np.array(points, dtype=np.float64).T
    return Curve(xs, ys)


def number(row: Row, column: str) -> float | None:
    """The value of a column where it is a finite number, else None."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_results(*paths: Path, text_columns: Sequence[str] = ()) -> Results:
    """The rows of .csv or .parquet tables of `study gather`, one table after the other.

    text_columns: columns of a .csv that are text whatever they look like, such as the axes of a
    study. Raises ValueError, which names the file, where it is no such table, and where two tables
    have the same run of the same study.
    """
    rows: list[dict[str, Any]] = []
    sources: dict[tuple[Any, ...], Path] = {}
    for path in paths:
        table = _read_table(path, text_columns)
        for place in dict.fromkeys((row["study"], row["run"], row["split"]) for row in table):
            other = sources.setdefault(place, path)
            if other is not path:
                raise ValueError(
                    f"{path}: run {place[1]} of study {place[0]} is in {other} too, and two runs "
                    "would become one curve; give each run once, or each study its own name"
                )
        rows += table
    return Results(tuple(rows), ", ".join(str(path) for path in paths))


def _read_table(path: Path, text_columns: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with `megatron-dlm study gather`")
    try:
        if path.suffix == ".csv":
            table = _read_csv(path, text_columns)
        elif path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            raise ValueError(f"{path}: a table of results ends in .csv or .parquet")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no {path.suffix} table: {error}") from None
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]}; it is no table of `megatron-dlm study gather`"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    _check_numbers(path, rows, [name for name in _NUMBERS if name not in text_columns])
    return rows


def _check_numbers(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Refuse text where a number belongs; one such cell of a .csv makes its column text."""
    for name in columns:
        wrong = [
            (line, row.get(name))
            for line, row in enumerate(rows, 2)  # the first line of a .csv is its header
            if not _is_number(name, row.get(name))
        ]
        if wrong:
            line, value = next((one for one in wrong if not _reads_as_number(one[1])), wrong[0])
            expected = "a whole number" if name == "step" else "a number or nothing"
            raise ValueError(f"{path} row {line}: {name} is {value!r}; expected {expected}")


def _is_number(name: str, value: Any) -> bool:
    if name == "step":
        return isinstance(value, (int, float)) and value % 1 == 0
    return value is None or isinstance(value, (int, float))


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _read_csv(path: Path, text_columns: Sequence[str]) -> Any:
    import pyarrow
    import pyarrow.csv

    kinds = dict.fromkeys((*_ALWAYS_TEXT, *text_columns), pyarrow.string())
    options = pyarrow.csv.ConvertOptions(
        column_types=kinds,
        # An empty cell is no value; NA, nan or null may be what a label is called.
        null_values=[""],
        strings_can_be_null=True,
    )
    return pyarrow.csv.read_csv(path, convert_options=options)
