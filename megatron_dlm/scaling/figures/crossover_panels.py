"""Curves of two families side by side, a panel for every setting, with their crossings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.crossings import Curve
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.style import COLORS, LINE_STYLES, axis_name, new_panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_START = 0.1
"""Share of a curve, its steep start, that does not set the limits of y."""


@dataclass(frozen=True)
class Panel:
    """One setting."""

    title: str
    families: Mapping[str, Sequence[Curve]]
    crossing: Estimate | None


def draw_panels(
    panels: Sequence[Panel],
    stem: Path,
    *,
    x: str,
    metric: str,
    is_log: bool = False,
    highest: float | None = None,
) -> tuple[Path, Path]:
    """Seeds as thin lines, means as thick ones, the crossing with its interval; PNG and SVG.

    highest: what lies above is cut off.
    """
    figure, grid = new_panels(len(panels))
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel)
        low, high = _visible_range(panel)
        axes.set_ylim(low, high if highest is None else min(high, max(highest, low + 1e-3)))
        if is_log:
            axes.set_xscale("log")
    figure.supxlabel(axis_name(x), fontsize=10)
    figure.supylabel(axis_name(metric), fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return save(figure, stem)


def _draw(axes: Axes, panel: Panel) -> None:
    for number, (label, family) in enumerate(panel.families.items()):
        color = COLORS[number]
        x, y = mean_curve(family)
        # Seeds of one setting may differ in number between the panels: the notes count them.
        axes.plot(x, y, color=color, linewidth=2, linestyle=LINE_STYLES[number], label=label)
        for curve in family if len(family) > 1 else ():
            axes.plot(curve.x, curve.y, color=color, linewidth=0.7, alpha=0.45)
        lowest = int(y.argmin())
        axes.plot(x[lowest], y[lowest], "o", color=color, markersize=6, markerfacecolor="white")
    title = panel.title
    if panel.crossing is not None:
        axes.axvline(panel.crossing.value, color="0.35", linewidth=1, linestyle=":")
        axes.axvspan(panel.crossing.low, panel.crossing.high, color="0.5", alpha=0.15, linewidth=0)
        title += f": crosses at {in_short(panel.crossing.value)}"
    axes.set_title(title, fontsize=10)


def mean_curve(family: Sequence[Curve]) -> tuple[Floats, Floats]:
    """x and the mean y over the x that all curves cover, joined by straight lines."""
    start, end = max(curve.x[0] for curve in family), min(curve.x[-1] for curve in family)
    x = np.unique(np.concatenate([curve.x for curve in family]))
    x = x[(x >= start) & (x <= end)]
    return x, np.mean([np.interp(x, curve.x, curve.y) for curve in family], axis=0)


def _visible_range(panel: Panel) -> tuple[float, float]:
    """Everything but the steep start, from which every run comes down."""
    curves = [curve for family in panel.families.values() for curve in family]
    lowest = min(float(curve.y.min()) for curve in curves)
    highest = max(float(curve.y[int(len(curve.y) * _NO_START) :].max()) for curve in curves)
    margin = 0.06 * (highest - lowest) or 0.1
    return lowest - margin, highest + margin
