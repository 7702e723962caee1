"""metrics.jsonl as columns of numbers, and fewer rows of them where there are too many to draw."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

_AXES = ("step", "tokens", "epoch")
# Of a table that must be thinned, the extremes of these are kept.
_LEADING = ("nelbo", "grad_norm")


@dataclass(frozen=True)
class Table:
    """Metrics of one split that were reported at the same steps; rows in the order of steps."""

    split: str
    axes: Mapping[str, np.ndarray]
    """step, tokens and epoch, float64 [n] each; NaN where a line has none."""
    columns: Mapping[str, np.ndarray]
    """Name -> float64 [n]; NaN where it was not a finite number."""

    @property
    def num_rows(self) -> int:
        """Lines of the file that this table came from."""
        return len(self.axes["step"])

    def at(self, rows: np.ndarray) -> Table:
        """Only these rows."""
        return Table(
            self.split,
            {name: values[rows] for name, values in self.axes.items()},
            {name: values[rows] for name, values in self.columns.items()},
        )


@dataclass
class _Split:
    """The lines of one split as they are read."""

    axes: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in _AXES}
    )
    rows: dict[str, array[int]] = field(default_factory=dict)
    values: dict[str, array[float]] = field(default_factory=dict)

    def add(self, entry: Mapping[str, Any]) -> None:
        row = len(self.axes["step"])
        for name in _AXES:
            self.axes[name].append(_number(entry.get(name)))
        for name, value in entry.items():
            if name in ("split", *_AXES) or isinstance(value, (str, bool, list, dict)):
                continue
            if name not in self.rows:
                self.rows[name], self.values[name] = array("q"), array("d")
            self.rows[name].append(row)
            self.values[name].append(_number(value))


def read_tables(path: Path) -> tuple[list[Table], int]:
    """The tables of a metrics.jsonl and the number of lines that are no entries.

    The last line does not count where it is half written, as that of a running or killed job.
    """
    splits: dict[str, _Split] = {}
    num_bad = 0
    with path.open("rb") as file:
        for line in file:
            entry = _entry(line)
            if entry is not None:
                splits.setdefault(entry["split"], _Split()).add(entry)
            elif line.endswith(b"\n"):
                num_bad += 1
    return [table for name, split in splits.items() for table in _tables(name, split)], num_bad


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
        return None
    step = entry.get("step")
    return entry if isinstance(step, (int, float)) and not isinstance(step, bool) else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _tables(name: str, split: _Split) -> Iterable[Table]:
    """One table for all metrics with the same rows."""
    axes = {axis: np.array(values) for axis, values in split.axes.items()}
    groups: dict[bytes, list[str]] = {}
    for metric, numbers in split.rows.items():
        groups.setdefault(numbers.tobytes(), []).append(metric)
    for metrics in groups.values():
        rows = np.array(split.rows[metrics[0]])
        columns = {metric: _finite(np.array(split.values[metric])) for metric in metrics}
        whole = Table(name, {axis: values[rows] for axis, values in axes.items()}, columns)
        yield whole.at(np.argsort(whole.axes["step"], kind="stable"))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def thinned(table: Table, max_rows: int) -> Table:
    """At most about max_rows rows: of every stretch its first one and those of its extremes."""
    if table.num_rows <= max_rows:
        return table
    leading = [name for name in _LEADING if name in table.columns] or list(table.columns)[:2]
    num_stretches = max(1, max_rows // (1 + 2 * len(leading)))
    edges = np.linspace(0, table.num_rows, num_stretches + 1).astype(np.int64)
    kept = {table.num_rows - 1}
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        kept.add(first)
        for name in leading:
            values = table.columns[name][first:last]
            if not np.isnan(values).all():
                kept.add(first + int(np.nanargmin(values)))
                kept.add(first + int(np.nanargmax(values)))
    return table.at(np.array(sorted(kept)))
