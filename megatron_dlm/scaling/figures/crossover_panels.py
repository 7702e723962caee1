"""Curves of two families side by side, a panel for every setting, with their crossings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.scaling.crossings import Comparison, Curve, on_common_x
from megatron_dlm.scaling.figures.directions import Direction
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.scales import range_without_start
from megatron_dlm.scaling.figures.style import COLORS, LINE_STYLES, axis_name, new_panels, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One setting."""

    title: str
    families: Mapping[str, Mapping[str, Curve]]
    """Label -> run -> its curve."""
    found: Comparison


def draw_panels(
    panels: Sequence[Panel],
    stem: Path,
    *,
    x: str,
    metric: str,
    direction: Direction,
    is_log: bool = False,
    highest: float | None = None,
) -> tuple[Path, Path]:
    """Seeds as thin lines, means as thick ones, the crossing with its interval; PNG and SVG.

    highest: what lies above is cut off.
    """
    figure, grid = new_panels(len(panels))
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel, direction)
        curves = [curve.y.tolist() for runs in panel.families.values() for curve in runs.values()]
        low, high = range_without_start(curves, is_rising=direction.higher_is_better)
        axes.set_ylim(low, high if highest is None else min(high, max(highest, low + 1e-3)))
        if is_log:
            axes.set_xscale("log")
    figure.supxlabel(axis_name(x), fontsize=10)
    figure.supylabel(axis_name(metric), fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return save(figure, stem)


def _draw(axes: Axes, panel: Panel, direction: Direction) -> None:
    for number, (label, runs) in enumerate(panel.families.items()):
        color = COLORS[number]
        x, table = on_common_x(tuple(runs.values()))
        y = table.mean(axis=0)
        # Seeds of one setting may differ in number between the panels: the notes count them.
        axes.plot(x, y, color=color, linewidth=2, linestyle=LINE_STYLES[number], label=label)
        for curve in runs.values() if len(runs) > 1 else ():
            axes.plot(curve.x, curve.y, color=color, linewidth=0.7, alpha=0.45)
        best = direction.best_place(y[x <= panel.found.end])
        axes.plot(x[best], y[best], "o", color=color, markersize=6, markerfacecolor="white")
    title, crossing = panel.title, panel.found.crossing
    if np.isfinite(crossing.value):
        axes.axvline(crossing.value, color="0.35", linewidth=1, linestyle=":")
        # An end beyond the range is drawn at its edge; the table tells that it is a bound.
        low, high = np.clip(
            [crossing.low, crossing.high], panel.found.start, panel.found.end
        ).tolist()
        axes.axvspan(low, high, color="0.5", alpha=0.15, linewidth=0)
        title += f": crosses at {in_short(crossing.value)}"
    axes.set_title(title, fontsize=10)
