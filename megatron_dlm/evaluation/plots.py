"""The figure of loss against the noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dlm.evaluation.shards import LevelPoint, LogSNRPoint
from megatron_dlm.scaling.figures.style import COLORS, save_whole


def plot_noise_levels(
    curves: Mapping[str, Sequence[LevelPoint] | Sequence[LogSNRPoint]], output: Path, *, title: str
) -> None:
    """Draw the loss against the noise level, a line for every label.

    Nats per masked token against the share of masked tokens, or of hybrid models the density of the
    bound against the log-SNR. The area under a line is the bound (NELBO) in nats per token. Writes
    PNG, PDF or SVG by name.
    """
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        axes.errorbar(
            [_place(point)[0] for point in points],
            [_place(point)[1] for point in points],
            yerr=[point.standard_error for point in points],
            color=COLORS[number % len(COLORS)],
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            capsize=2,
            label=label,
        )
    axes.set_ylim(bottom=0)
    if any(isinstance(point, LogSNRPoint) for points in curves.values() for point in points):
        axes.set_xlabel("log-SNR")
        axes.set_ylabel("loss of a token per unit of log-SNR [nats]")
    else:
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of masked tokens")
        axes.set_ylabel("loss of a masked token [nats]")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.9, edgecolor="none", title="dataset: area under its line")
    axes.set_title(title, fontsize=10)
    save_whole(figure, output)


def _place(point: LevelPoint | LogSNRPoint) -> tuple[float, float]:
    if isinstance(point, LogSNRPoint):
        return point.log_snr, point.nats_per_token_and_log_snr
    return point.level, point.nats_per_masked_token
