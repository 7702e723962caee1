"""Kind `curves`: validation curves, means over seeds thick and seeds thin, one panel per label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.crossings import Curve
from megatron_dlm.scaling.figures.drawn import Drawn, in_short, write_numbers
from megatron_dlm.scaling.figures.families import (
    Grouping,
    Member,
    bound_note,
    estimate_of,
    grouped,
    in_words,
    interval_note,
    mean_over_seeds,
    members_of,
    refuse_twins,
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

_HEADER = ("panel", "line", "seeds", "lowest", "at", "last", "at the end")


@dataclass(frozen=True)
class CurvesSpec(Grouping):
    """Validation curves."""

    x: Literal["epoch", "tokens", "training_flops", "step"] = "tokens"
    """Against what the metric is drawn."""
    metric: str = "nelbo"
    """Column of the validations, lower is better."""
    smoothing: float = 0.0
    """Width of a Gaussian average over the points of a curve, as a factor in x; 0: none."""
    x_scale: Literal["linear", "log"] = "linear"
    """Scale of the x axis."""
    y_scale: Literal["linear", "log"] = "linear"
    """Scale of the metric."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")


@dataclass(frozen=True)
class _Line:
    """One setting: its seeds, and their mean where all of them have reported."""

    panel: str
    label: str
    curves: tuple[Curve, ...]
    x: Floats
    mean: Floats
    low: Floats
    high: Floats

    @property
    def lowest(self) -> Estimate:
        return estimate_of([curve.y.min() for curve in self.curves])

    @property
    def lowest_at(self) -> float:
        return float(self.x[self.mean.argmin()])


def draw(spec: CurvesSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Write stem.png, .svg and .csv; raises ValueError where no run has two such reports."""
    results.check_columns(spec.x, spec.metric)
    members = members_of(results, study, spec)
    refuse_twins(members, study, lambda member: (member.panel, member.line, member.seed))
    lines, left_out = _lines(members, spec)
    if not lines:
        raise ValueError(
            f"{results.source}: no run has two validations with {spec.x} and {spec.metric}; "
            "run the study further"
        )
    files = (*_picture(lines, spec, stem), _numbers(lines, spec, stem))
    notes = (
        *bound_note(members, spec.metric, study),
        _smoothing_note(spec),
        interval_note([len(line.curves) for line in lines]),
        *(
            f"Left out, with fewer than two such reports: {', '.join(left_out)}."
            for _ in left_out[:1]
        ),
    )
    rows = tuple(_row(line) for line in lines)
    title = f"{study.name}: {axis_name(spec.metric)} against {axis_name(spec.x)}"
    return Drawn(files, title, _HEADER, rows, notes)


def _lines(members: Sequence[Member], spec: CurvesSpec) -> tuple[list[_Line], list[str]]:
    """The lines by panel, and the names of runs that have no curve."""
    lines, left_out = [], []
    for panel, of_panel in grouped(members, lambda member: member.panel).items():
        for label, of_line in grouped(of_panel, lambda member: member.line).items():
            found = [(member.run, _curve(member, spec)) for member in of_line]
            left_out += [run for run, curve in found if curve is None]
            curves = [curve for _, curve in found if curve is not None]
            if curves:
                lines.append(_line(panel, label, curves))
    return lines, left_out


def _curve(member: Member, spec: CurvesSpec) -> Curve | None:
    curve = curve_of(member.rows, spec.x, spec.metric)
    if curve is not None and spec.x_scale == "log" and curve.x[0] <= 0:
        curve = Curve(curve.x[1:], curve.y[1:]) if len(curve.x) > 2 else None
    if curve is None or spec.smoothing == 0:
        return curve
    return curve.smoothed(spec.smoothing)


def _line(panel: str, label: str, curves: Sequence[Curve]) -> _Line:
    start, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(x >= start) & (x <= end)]
    table = np.stack([np.interp(x, curve.x, curve.y) for curve in curves])
    return _Line(panel, label, tuple(curves), x, *mean_over_seeds(table))


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
        for curve in line.curves:
            axes.plot(curve.x, curve.y, color=style["color"], linewidth=0.6, alpha=0.4)
    axes.plot(line.x, line.mean, linewidth=1.9, label=line.label or None, **style)
    lowest = int(line.mean.argmin())
    axes.plot(
        *(line.x[lowest], line.mean[lowest]),
        **{"marker": marker, "markersize": 7, "linestyle": "none", "markeredgewidth": 1.6},
        **{"markerfacecolor": "white", "markeredgecolor": style["color"], "zorder": 5},
    )


def _scale(axes: Axes, lines: Sequence[_Line], spec: CurvesSpec) -> None:
    axes.set_xscale(spec.x_scale)
    axes.set_yscale(spec.y_scale)
    if spec.y_scale == "linear":
        axes.set_ylim(
            *range_without_start([curve.y.tolist() for line in lines for curve in line.curves])
        )
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


def _row(line: _Line) -> tuple[str, ...]:
    lowest_at = in_short(line.lowest_at)
    last = Estimate(float(line.mean[-1]), float(line.low[-1]), float(line.high[-1]))
    return (
        *(line.panel, line.label, str(len(line.curves)), in_words(line.lowest), lowest_at),
        *(in_words(last), in_short(float(line.x[-1]))),
    )


def _smoothing_note(spec: CurvesSpec) -> str:
    if spec.smoothing == 0:
        return "Curves are not smoothed; rings mark the lowest mean."
    return (
        f"Curves are smoothed over a factor of {spec.smoothing:g} in x (standard deviation of a "
        "Gaussian); rings mark the lowest mean."
    )
