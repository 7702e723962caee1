"""`study crossover`: one comparison for every setting of a study, as a table and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_dlm.config.study_commands import StudyCrossoverConfig
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.crossings import Comparison, Curve, best, compare
from megatron_dlm.scaling.crossover_figure import Panel, draw_panels, in_short
from megatron_dlm.scaling.study import Study, read_study
from megatron_dlm.scaling.study_results import tidy_rows

_FIELDS = (
    *("setting", "seeds_first", "seeds_second", "crossing", "crossing_low", "crossing_high"),
    *("share_of_resamples", "end_of_range", "best_first", "best_second", "num_passages"),
)


@dataclass(frozen=True)
class Setting:
    """One place in the study, with the curves of both labels there."""

    name: str
    first: tuple[Curve, ...]
    second: tuple[Curve, ...]


def crossover_study(config: StudyCrossoverConfig) -> None:
    """Write crossover.csv, .png and .svg; print the table.

    Raises ValueError where the study lacks the axis or a label, or no setting has both.
    """
    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    settings = settings_of(study, list(tidy_rows(study, folder, split="valid")), config)
    rows, panels = [], []
    for setting in settings:
        found = compare(
            setting.first,
            setting.second,
            smoothing=config.smoothing,
            count=config.resamples,
        )
        rows.append(_row(setting, found))
        families = {config.first: setting.first, config.second: setting.second}
        panels.append(Panel(setting.name, families, found.crossing))
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "crossover.csv", text.getvalue())
    for suffix in (".png", ".svg"):
        draw_panels(panels, folder / f"crossover{suffix}", x=config.x, metric=config.metric)
    _tell(study, rows, config)
    print(f"{folder / 'crossover.csv'}, crossover.png, crossover.svg")


def settings_of(
    study: Study, rows: Sequence[Mapping[str, Any]], config: StudyCrossoverConfig
) -> list[Setting]:
    """The settings at which both labels have reported, in the order of the study."""
    _check_axes(study, config)
    reports: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        reports.setdefault(row["run"], []).append(row)
    curves: dict[str, dict[str, list[Curve]]] = {}
    for run in study.runs:
        of_run = reports.get(run.name, [])
        points = [(_x(row, config.x), row.get(config.metric)) for row in of_run]
        whole = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if len(whole) < 2:
            continue
        others = [run.labels[a] for a in study.axes if a not in (config.axis, config.seeds)]
        of_setting = curves.setdefault("_".join(others) or study.name, {})
        x, y = np.array(whole, dtype=np.float64).T
        of_setting.setdefault(run.labels[config.axis], []).append(Curve(x, y))
    found = [
        Setting(name, tuple(labels[config.first]), tuple(labels[config.second]))
        for name, labels in curves.items()
        if config.first in labels and config.second in labels
    ]
    if not found:
        raise ValueError(
            f"{config.output_dir}: no setting of {study.name} has validations with {config.metric} "
            f"of both {config.first} and {config.second}; run the study further"
        )
    return found


def _check_axes(study: Study, config: StudyCrossoverConfig) -> None:
    for field, axis in (("axis", config.axis), ("seeds", config.seeds)):
        if axis is not None and axis not in study.axes:
            raise ValueError(f"{field} {axis} is no axis of {study.name}: {', '.join(study.axes)}")
    labels = dict.fromkeys(run.labels[config.axis] for run in study.runs)
    for field, label in (("first", config.first), ("second", config.second)):
        if label not in labels:
            raise ValueError(f"{field} {label} is no label of {config.axis}: {', '.join(labels)}")


def _x(row: Mapping[str, Any], name: str) -> float:
    if name == "training_flops":
        return float(row["tokens"]) * float(row["training_flops_per_token"])
    return float(row[name])


def _row(setting: Setting, found: Comparison) -> dict[str, object]:
    crossing = found.crossing
    numbers: tuple[float | None, ...] = (None, None, None)
    if crossing is not None:
        numbers = (crossing.value, crossing.low, crossing.high)
    values = (
        *(setting.name, len(setting.first), len(setting.second), *numbers),
        *(found.share, found.bound, best(setting.first), best(setting.second)),
        len(found.passages),
    )
    return dict(zip(_FIELDS, values, strict=True))


def _tell(study: Study, rows: Sequence[Mapping[str, Any]], config: StudyCrossoverConfig) -> None:
    table = Table(title=f"{study.name}: {config.second} below {config.first} [{config.metric}]")
    for column in ("setting", f"from {config.x}", "95 % interval", "share", "best of each"):
        table.add_column(column)
    for row in rows:
        if row["crossing"] is None:
            place, interval = f"not before {in_short(row['end_of_range'])}", ""
        else:
            place = in_short(row["crossing"])
            interval = f"{in_short(row['crossing_low'])} to {in_short(row['crossing_high'])}"
        bests = f"{row['best_first']:.3f} {row['best_second']:.3f}"
        table.add_row(row["setting"], place, interval, f"{row['share_of_resamples']:.0%}", bests)
    Console().print(table)
