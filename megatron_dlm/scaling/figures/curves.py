"""Kind `curves`: validation curves, means over seeds thick and seeds thin, one panel per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.crossings import Curve, on_common_x
from megatron_dlm.scaling.figures.directions import Direction, direction_of
from megatron_dlm.scaling.figures.drawn import Drawn, in_short, write_numbers
from megatron_dlm.scaling.figures.extents import apart, share_x, unequal_ends
from megatron_dlm.scaling.figures.families import (
    Grouping,
    Member,
    bound_note,
    grouped,
    in_words,
    interval_note,
    mean_over_seeds,
    members_of,
    refuse_twins,
    smoothing_words,
)
from megatron_dlm.scaling.figures.scales import (
    count_ticks,
    legend_above,
    range_without_start,
)
from megatron_dlm.scaling.figures.style import axis_name, look, new_panels, save
from megatron_dlm.scaling.results import Results, curve_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_dlm.scaling.study import Study


@dataclass(frozen=True)
class CurvesSpec(Grouping):
    """Validation curves."""

    x: Literal["epoch", "tokens", "training_flops", "step"] = "tokens"
    """Against what the metric is drawn."""
    metric: str = "nelbo"
    """Column of the validations."""
    higher_is_better: bool = False
    """Whether the metric is one like accuracy; of losses the lower one is better."""
    smoothing: float = 0.0
    """Width of a Gaussian average over the points of a curve: its standard deviation in ln x, so
    0.1 is about 10 % of x; 0: none."""
    x_scale: Literal["linear", "log"] = "linear"
    """Scale of the x axis."""
    y_scale: Literal["linear", "log"] = "linear"
    """Scale of the metric."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")

    @property
    def direction(self) -> Direction:
        """Which values of the metric are better."""
        return direction_of(higher_is_better=self.higher_is_better)


@dataclass(frozen=True)
class _Line:
    """One setting: its seeds, and their mean where all of them have reported."""

    panel: str
    label: str
    curves: Mapping[str, Curve]
    """Run -> its curve."""
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    best: int
    """Place of the best mean."""

    def at(self, place: int) -> tuple[str, str]:
        """The mean there with its interval, and x, in words."""
        mean, low, high = (float(values[place]) for values in (self.mean, self.low, self.high))
        return in_words(Estimate(mean, low, high)), in_short(float(self.x[place]))


def draw(spec: CurvesSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Write stem.png, .svg and .csv; raises ValueError where no line can be drawn."""
    results.check_columns(spec.x, spec.metric)
    members = members_of(results, study, spec)
    refuse_twins(members, study, lambda member: (member.panel, member.line, member.seed))
    lines, left_out = _lines(members, spec)
    if not lines:
        raise ValueError(
            f"{results.source}: no run has two validations with {spec.x} and {spec.metric}; "
            f"run the study further. {' '.join(left_out)}"
        )
    ends = [unequal_ends(line.curves) for line in lines]
    files = (*_picture(lines, spec, stem), _numbers(lines, spec, stem))
    notes = (
        *bound_note(members, spec.metric, study),
        _smoothing_note(spec),
        interval_note([len(line.curves) for line in lines]),
        *(f"{end}; their mean ends with the first." for end in ends if end),
        *left_out,
    )
    header = ("panel", "line", "seeds", spec.direction.superlative, "at", "last", "at the end")
    rows = tuple(
        (line.panel, line.label, str(len(line.curves)), *line.at(line.best), *line.at(-1))
        for line in lines
    )
    title = f"{study.name}: {axis_name(spec.metric)} against {axis_name(spec.x)}"
    return Drawn(files, title, header, rows, notes)


def _lines(members: Sequence[Member], spec: CurvesSpec) -> tuple[list[_Line], list[str]]:
    """The lines by panel, and sentences about what cannot be drawn."""
    lines, notes, without_curve = [], [], []
    for panel, of_panel in grouped(members, lambda member: member.panel).items():
        for label, of_line in grouped(of_panel, lambda member: member.line).items():
            found = {member.run: _curve(member, spec) for member in of_line}
            without_curve += [run for run, curve in found.items() if curve is None]
            curves = {run: curve for run, curve in found.items() if curve is not None}
            if curves and share_x(curves):
                lines.append(_line(panel, label, curves, spec))
            elif curves:
                notes.append(f"Left out: {apart(curves)}.")
    if without_curve:
        notes.append(f"Left out, with fewer than two such reports: {', '.join(without_curve)}.")
    return lines, notes


def _curve(member: Member, spec: CurvesSpec) -> Curve | None:
    curve = curve_of(member.rows, spec.x, spec.metric)
    if curve is not None and spec.x_scale == "log" and curve.x[0] <= 0:
        curve = Curve(curve.x[1:], curve.y[1:]) if len(curve.x) > 2 else None
    if curve is None or spec.smoothing == 0:
        return curve
    return curve.smoothed(spec.smoothing)


def _line(panel: str, label: str, curves: Mapping[str, Curve], spec: CurvesSpec) -> _Line:
    x, table = on_common_x(tuple(curves.values()))
    mean, low, high = mean_over_seeds(table)
    return _Line(panel, label, curves, x, mean, low, high, spec.direction.best_place(mean))


def _picture(lines: Sequence[_Line], spec: CurvesSpec, stem: Path) -> tuple[Path, Path]:
    panels = list(dict.fromkeys(line.panel for line in lines))
    labels = list(dict.fromkeys(line.label for line in lines))
    is_alone = len(panels) == 1
    width, height = (6.5, 4.0) if is_alone else (3.6, 3.0)
    figure, places = new_panels(len(panels), width=width, height=height)
    for axes, panel in zip(places, panels, strict=True):
        here = [line for line in lines if line.panel == panel]
        for line in here:
            _draw_line(axes, line, labels.index(line.label))
        if panel:
            axes.set_title(panel)
        _scale(axes, here, spec)
    figure.supxlabel(axis_name(spec.x), fontsize=10)
    figure.supylabel(axis_name(spec.metric), fontsize=10)
    legend_above(figure, places)
    return save(figure, stem)


def _draw_line(axes: Axes, line: _Line, number: int) -> None:
    style = look(number)
    marker = style.pop("marker")
    if len(line.curves) > 1:
        for curve in line.curves.values():
            axes.plot(curve.x, curve.y, color=style["color"], linewidth=0.6, alpha=0.4)
    axes.plot(line.x, line.mean, linewidth=1.9, label=line.label or None, **style)
    axes.plot(
        *(line.x[line.best], line.mean[line.best]),
        **{"marker": marker, "markersize": 7, "linestyle": "none", "markeredgewidth": 1.6},
        **{"markerfacecolor": "white", "markeredgecolor": style["color"], "zorder": 5},
    )


def _scale(axes: Axes, lines: Sequence[_Line], spec: CurvesSpec) -> None:
    axes.set_xscale(spec.x_scale)
    axes.set_yscale(spec.y_scale)
    if spec.y_scale == "linear":
        curves = [curve.y.tolist() for line in lines for curve in line.curves.values()]
        axes.set_ylim(*range_without_start(curves, is_rising=spec.higher_is_better))
    count_ticks(axes)


def _numbers(lines: Sequence[_Line], spec: CurvesSpec, stem: Path) -> Path:
    rows: list[tuple[str | float, ...]] = [
        (line.panel, line.label, len(line.curves), *values)
        for line in lines
        for values in np.stack([line.x, line.mean, line.low, line.high], axis=1).tolist()
    ]
    names = (f"{spec.metric}", f"{spec.metric}_low", f"{spec.metric}_high")
    header = ("panel", "line", "num_seeds", spec.x, *names)
    return write_numbers(stem.with_name(f"{stem.name}.csv"), header, rows)


def _smoothing_note(spec: CurvesSpec) -> str:
    rings = f"rings mark the {spec.direction.superlative} mean"
    if spec.smoothing == 0:
        return f"Curves are not smoothed; {rings}."
    return f"Curves are smoothed over {smoothing_words(spec.smoothing)}; {rings}."
