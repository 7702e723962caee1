"""Curves of two families side by side, a panel for every setting, with their crossings."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.crossings import Curve
from megatron_dlm.scaling.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "epoch": "epochs over the unique tokens",
    "tokens": "training tokens",
    "training_flops": "training FLOPs",
}
_MAX_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One setting."""

    title: str
    families: Mapping[str, Sequence[Curve]]
    crossing: Estimate | None


def draw_panels(panels: Sequence[Panel], output: Path, *, x: str, metric: str) -> None:
    """Seeds as thin lines, means as thick ones, the crossing with its interval; PNG or SVG."""
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    columns = min(_MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (1.0 + 3.6 * columns, 0.8 + 3.0 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(panels):
            _draw(axes, panels[place])
        else:
            axes.set_visible(False)
    figure.supxlabel(_NAMES[x], fontsize=10)
    figure.supylabel(f"{metric} [nats per token]", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    temporary = output.with_name(f".{output.stem}.tmp{output.suffix}")
    figure.savefig(temporary)
    os.replace(temporary, output)


def _draw(axes: Axes, panel: Panel) -> None:
    for number, (label, family) in enumerate(panel.families.items()):
        color = COLORS[number]
        for curve in family:
            axes.plot(curve.x, curve.y, color=color, linewidth=0.7, alpha=0.45)
        x, y = _mean(family)
        seeds = "" if len(family) == 1 else f", mean of {len(family)} seeds"
        style = ("-", "--")[number % 2]  # also told apart without colour
        axes.plot(x, y, color=color, linewidth=2, linestyle=style, label=f"{label}{seeds}")
    title = panel.title
    if panel.crossing is not None:
        axes.axvline(panel.crossing.value, color="0.35", linewidth=1, linestyle=":")
        axes.axvspan(panel.crossing.low, panel.crossing.high, color="0.5", alpha=0.15, linewidth=0)
        title += f": crosses at {in_short(panel.crossing.value)}"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(*_visible_range(panel))


def in_short(value: float) -> str:
    """Three digits, without powers of ten where people do not need them."""
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.3g}"


def _mean(family: Sequence[Curve]) -> tuple[Floats, Floats]:
    start, end = max(curve.x[0] for curve in family), min(curve.x[-1] for curve in family)
    x = np.unique(np.concatenate([curve.x for curve in family]))
    x = x[(x >= start) & (x <= end)]
    return x, np.mean([np.interp(x, curve.x, curve.y) for curve in family], axis=0)


def _visible_range(panel: Panel) -> tuple[float, float]:
    """Everything but the steep start, from which every run comes down."""
    curves = [curve for family in panel.families.values() for curve in family]
    lowest = min(float(curve.y.min()) for curve in curves)
    highest = max(float(curve.y[len(curve.y) // 10 :].max()) for curve in curves)
    margin = 0.06 * (highest - lowest) or 0.1
    return lowest - margin, highest + margin
