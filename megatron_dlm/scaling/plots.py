"""Figures of runs, drawn from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.scaling.crossover import (
    Crossing,
    CurvePoint,
    best_point,
    find_crossing,
    read_validation_curve,
)
from megatron_dlm.scaling.figures.scales import range_without_start
from megatron_dlm.scaling.figures.style import COLORS, MARKERS, save_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class CurveSummary:
    """What the figure shows, in numbers."""

    best: dict[str, CurvePoint]
    last: dict[str, CurvePoint]
    crossing: Crossing | None


def plot_validation_curves(
    runs: Mapping[str, Path],
    output: Path,
    *,
    title: str = "Validation loss of repeated data",
    subtitle: str = "autoregressive: exact NLL; masked diffusion: upper bound (NELBO)",
) -> CurveSummary:
    """Draw the validation curves of `runs` (label -> metrics.jsonl) into `output` (PNG, PDF, SVG).

    Nats per token against epochs, and against tokens on the upper axis where all runs repeat the
    same number of unique tokens. With two runs, a crossing is where the second passes below the
    first for good.
    """
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    if not runs:
        raise ValueError("give at least one run to plot")
    curves = {label: read_validation_curve(path) for label, path in runs.items()}
    crossing = find_crossing(*curves.values()) if len(curves) == 2 else None
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        _draw_curve(axes, label, curve, number)
    if crossing is not None:
        _draw_crossing(axes, crossing)
    _add_token_axis(axes, list(curves.values()))
    axes.set_xlabel("epochs over the unique tokens")
    axes.set_ylabel("validation loss [nats per token]")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    values = [[point.nats_per_token for point in curve] for curve in curves.values()]
    axes.set_ylim(*range_without_start(values))
    axes.legend(framealpha=0.9, edgecolor="none")
    figure.suptitle(title, fontsize=12)
    axes.set_title(subtitle, fontsize=9, color="0.35")
    save_whole(figure, output)
    return CurveSummary(
        best={label: best_point(curve) for label, curve in curves.items()},
        last={label: curve[-1] for label, curve in curves.items()},
        crossing=crossing,
    )


def _draw_curve(axes: Axes, label: str, curve: Sequence[CurvePoint], number: int) -> None:
    color = COLORS[number % len(COLORS)]
    marker = MARKERS[number % len(MARKERS)]
    best = best_point(curve)
    axes.plot(
        [point.epoch for point in curve],
        [point.nats_per_token for point in curve],
        color=color,
        linewidth=1.8,
        marker=marker,
        markersize=3,
        label=f"{label}: best {best.nats_per_token:.3f} at epoch {best.epoch:.3g}",
    )
    # The ring is what the legend calls best.
    axes.plot(
        best.epoch,
        best.nats_per_token,
        marker=marker,
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=color,
        markeredgewidth=1.6,
    )


def _draw_crossing(axes: Axes, crossing: Crossing) -> None:
    axes.axvline(crossing.epoch, color="0.4", linewidth=1, linestyle="--", zorder=0)
    axes.annotate(
        f"crossing: epoch {crossing.epoch:.3g}",
        xy=(crossing.epoch, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(5, 6),
        textcoords="offset points",
        fontsize=9,
        color="0.3",
    )


def _add_token_axis(axes: Axes, curves: Sequence[Sequence[CurvePoint]]) -> None:
    """Second x axis in training tokens, if one epoch is the same number of tokens in all runs."""
    from matplotlib.ticker import EngFormatter

    lasts = [curve[-1] for curve in curves if curve[-1].epoch > 0]
    rates = [point.tokens / point.epoch for point in lasts]
    if not rates or max(rates) > 1.01 * min(rates):
        return
    rate = rates[0]
    upper = axes.secondary_xaxis(
        "top",
        functions=(
            lambda epochs: np.asarray(epochs) * rate,
            lambda tokens: np.asarray(tokens) / rate,
        ),
    )
    upper.set_xlabel("training tokens")
    upper.xaxis.set_major_formatter(EngFormatter(sep=""))
