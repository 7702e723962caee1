"""The picture of kind `final`: points with intervals, lines over numbers, dots over labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_dlm.scaling.figures.directions import Direction
from megatron_dlm.scaling.figures.scales import Scale, is_logarithmic, legend_above, name_values
from megatron_dlm.scaling.figures.scores import Line, Point, Score, Scores, X
from megatron_dlm.scaling.figures.style import axis_name, look, new_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OTHERS = "others"
_APART = 0.12
"""Between the dots of two lines at one label, where labels are 1 apart."""
_REFERENCE: dict[str, Any] = {"color": "0.25", "linestyle": (0, (4, 2, 1, 2)), "linewidth": 1.4}


class Keys(Protocol):
    """What the picture needs of the keys of the figure."""

    @property
    def x(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def score(self) -> Score: ...
    @property
    def direction(self) -> Direction: ...
    @property
    def over(self) -> Mapping[str, str]: ...
    @property
    def x_scale(self) -> Scale: ...
    @property
    def highest(self) -> float | None: ...


def draw_scores(
    scores: Scores, keys: Keys, best: Mapping[tuple[str, str], X], order: Sequence[str] = ()
) -> Figure:
    """order: the labels of x where it is an axis; empty where it is a number."""
    panels = list(dict.fromkeys(line.panel for line in (*scores.lines, *scores.references)))
    labels = list(dict.fromkeys(line.label for line in scores.lines))
    width, height = (5.5, 3.8) if len(panels) == 1 else (3.6, 3.0)
    figure, places = new_panels(len(panels), width=width, height=height)
    for axes, panel in zip(places, panels, strict=True):
        for line in scores.lines:
            if line.panel == panel:
                style = look(labels.index(line.label))
                shift = _APART * (labels.index(line.label) - (len(labels) - 1) / 2)
                name = line.label or (_OTHERS if scores.references else None)
                x = [_place(point, order, shift) for point in line.points]
                _draw_line(axes, line, x, name=name, **style)
                _mark(axes, line, x, best.get((panel, line.label)), style["color"])
        for reference in scores.references:
            if reference.panel == panel:
                _draw_reference(axes, reference)
        _finish(axes, panel, scores, keys, order)
        if panel:
            axes.set_title(panel)
    _share_y(places)
    figure.supxlabel(axis_name(keys.x), fontsize=10)
    figure.supylabel(score_name(keys), fontsize=10)
    legend_above(figure, places)
    return figure


def score_name(keys: Keys) -> str:
    """What the scores are, with their unit; a ratio has none."""
    kind = keys.direction.superlative if keys.score == "best" else "last"
    name = axis_name(keys.metric)
    if keys.over:
        return f"{kind} {name.partition(' [')[0]} over that of {' '.join(keys.over.values())}"
    return f"{kind} {name}"


def _place(point: Point, order: Sequence[str], shift: float) -> float:
    return order.index(str(point.x)) + shift if order else float(point.x)


def _draw_line(
    axes: Axes, line: Line, x: Sequence[float], *, name: str | None, **style: Any
) -> None:
    means = [point.mean for point in line.points]
    for place, point in zip(x, line.points, strict=True):
        if len(point.scores) > 1:
            every = np.full(len(point.scores), place)
            axes.plot(every, point.scores, ".", color=style["color"], markersize=3, alpha=0.45)
    below = [mean.value - mean.low for mean in means]
    above = [mean.high - mean.value for mean in means]
    if isinstance(line.points[0].x, str):
        style["linestyle"] = "none"
    axes.errorbar(
        *(x, [mean.value for mean in means]),
        yerr=(below, above) if any(below) or any(above) else None,
        **{"label": name, "linewidth": 1.7, "markersize": 5.5, "capsize": 3, **style},
    )


def _mark(axes: Axes, line: Line, x: Sequence[float], best: X | None, color: str) -> None:
    """A ring around the best point of a line."""
    for place, point in zip(x, line.points, strict=True):
        if point.x == best:
            ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none"}
            y = point.mean.value
            axes.plot([place], [y], markeredgecolor=color, markeredgewidth=1.3, **ring)


def _draw_reference(axes: Axes, line: Line) -> None:
    [point] = line.points
    mean = point.mean
    axes.axhline(mean.value, label=line.label, **_REFERENCE)
    if mean.low < mean.high:
        axes.axhspan(mean.low, mean.high, color="0.4", alpha=0.18, linewidth=0)


def _share_y(places: Sequence[Axes]) -> None:
    """The same range in all panels: scores are compared between them too."""
    lows, highs = zip(*(axes.get_ylim() for axes in places), strict=True)
    for axes in places:
        axes.set_ylim(min(lows), max(highs))


def _finish(axes: Axes, panel: str, scores: Scores, keys: Keys, order: Sequence[str]) -> None:
    if order:
        axes.set_xticks(range(len(order)), order)
        axes.set_xlim(-0.5, len(order) - 0.5)
        if sum(len(label) for label in order) > 28:
            axes.tick_params(axis="x", labelrotation=40)
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")
    else:
        values = [value for line in scores.lines for value in line.numbers]
        here = [value for line in scores.lines if line.panel == panel for value in line.numbers]
        name_values(axes, here or values, logarithmic=is_logarithmic(values, keys.x_scale))
    if keys.highest is not None:
        axes.set_ylim(top=keys.highest)
