"""The picture of kind `isoflop`: parabolas of every line, then three panels of laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dlm.scaling.figures.scales import count_ticks, legend_above, short_tick
from megatron_dlm.scaling.figures.style import MARKERS, look, new_panels
from megatron_dlm.scaling.isoflop import NAMES, ComputeOptimal, Optimum, Trained
from megatron_dlm.scaling.minima import fit_parabola

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_BEYOND = 1.6
"""Laws are drawn this factor beyond the budgets."""


@dataclass(frozen=True)
class Family:
    """One line: its models at all budgets, the best of each, and the laws through those."""

    label: str
    models: tuple[Trained, ...]
    optima: tuple[Optimum, ...]
    laws: ComputeOptimal | None


def draw_families(families: Sequence[Family], *, size_name: str, loss_name: str) -> Figure:
    """A row or more of parabolas, and a row of laws."""
    above = -(-len(families) // _COLUMNS) * _COLUMNS
    figure, places = new_panels(above + len(NAMES), width=3.7, height=3.1)
    for axes in places[len(families) : above]:
        axes.set_visible(False)
    budgets = sorted({model.compute_flops for family in families for model in family.models})
    for axes, family in zip(places, families, strict=False):
        _draw_parabolas(axes, family, budgets)
        axes.set_title(family.label)
        axes.set_xlabel(size_name)
    places[0].set_ylabel(loss_name)
    names = dict(zip(NAMES, (size_name, "training tokens", loss_name), strict=True))
    for axes, name in zip(places[above:], NAMES, strict=True):
        for number, family in enumerate(families):
            _draw_law(axes, family, name, look(number))
        _finish_law(axes, name, names[name])
    legend_above(figure, places[: len(families)])
    return figure


def _draw_parabolas(axes: Axes, family: Family, budgets: Sequence[float]) -> None:
    from matplotlib import colormaps

    axes.set_xscale("log")
    optima = {optimum.compute_flops: optimum for optimum in family.optima}
    for number, budget in enumerate(budgets):
        models = [model for model in family.models if model.compute_flops == budget]
        if not models:
            continue
        # The palest end of the map is lost on paper.
        color = colormaps["viridis"](0.85 * number / max(1, len(budgets) - 1))
        sizes = np.array([model.size for model in models])
        losses = [model.loss_nats for model in models]
        marker = MARKERS[number % len(MARKERS)]
        name = f"{budget:.2e} FLOPs".replace("e+", "e")
        axes.plot(sizes, losses, marker, color=color, markersize=4.5, label=name)
        _draw_parabola(axes, sizes, losses, color, is_dashed=budget not in optima)
        if budget in optima:
            best = optima[budget]
            star: dict[str, Any] = {"marker": "*", "markersize": 12, "markeredgecolor": "black"}
            axes.plot([best.size], [best.loss_nats], color=color, zorder=5, **star)
    count_ticks(axes)


def _draw_parabola(
    axes: Axes, sizes: np.ndarray[Any, Any], losses: Sequence[float], color: Any, *, is_dashed: bool
) -> None:
    try:
        parabola = fit_parabola(sizes, losses)
    except ValueError:
        return  # too few sizes, or no lowest point: the points stand alone
    grid = np.geomspace(sizes.min(), sizes.max(), 60)
    fitted = parabola.lowest + parabola.curvature * np.log(grid / parabola.best_size) ** 2
    axes.plot(grid, fitted, "--" if is_dashed else "-", color=color, linewidth=1.2)


def _draw_law(axes: Axes, family: Family, name: str, style: dict[str, Any]) -> None:
    if family.laws is None:
        optima, label = family.optima, family.label
    else:
        optima = family.laws.optima
        exponent = family.laws.intervals[name]
        label = f"{family.label} $C^{{{exponent.value:.3g}}}$"
    if not optima:
        return
    compute = np.array([optimum.compute_flops for optimum in optima])
    values = [_value(optimum, name) for optimum in optima]
    marker = style["marker"]
    axes.plot(compute, values, marker, color=style["color"], markersize=5.5)
    if family.laws is None:
        axes.plot([], [], marker, color=style["color"], label=label)
        return
    grid = np.geomspace(compute.min() / _BEYOND, compute.max() * _BEYOND, 60)
    law = {"size": family.laws.size, "data": family.laws.data, "loss": family.laws.loss}[name]
    axes.plot(grid, [law(x) for x in grid], label=label, linewidth=1.7, **{**style, "marker": ""})
    coefficients, exponents = family.laws.drawn[name].T
    drawn = coefficients[:, None] * grid ** exponents[:, None]
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    axes.fill_between(grid, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _value(optimum: Optimum, name: str) -> float:
    return {"size": optimum.size, "data": optimum.data, "loss": optimum.loss_nats}[name]


def _finish_law(axes: Axes, name: str, label: str) -> None:
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    axes.set_xscale("log")
    axes.set_yscale("log")
    count_ticks(axes)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high / low < 3:  # no power of ten within: as on a plain axis
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high / low < 300:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="lower left" if name == "loss" else "upper left")
