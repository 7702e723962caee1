"""How all figures look: colours, markers and lines that are told apart in grey too, and saving.

Needs matplotlib, which is imported when a figure is drawn.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for colour-blind readers and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1))),
)

AXIS_NAMES = {
    "epoch": "epochs over the unique tokens",
    "tokens": "training tokens",
    "training_flops": "training FLOPs",
    "step": "step",
    "unique_tokens": "unique tokens",
    "data.unique_tokens": "unique tokens",
    "num_parameters": "parameters",
    "optimizer.lr": "learning rate",
    "model.hidden_dropout": "dropout of hidden layers",
    "objective.input_masking_ratio": "share of masked inputs",
    "nelbo": "validation loss [nats per token]",
    "loss": "trained loss",
    "acc": "accuracy",
    "acc_norm": "accuracy by length",
    "bits_per_byte": "bits per byte",
    "delta_nll": "delta NLL [nats]",
    "delta_nll_per_byte": "delta NLL [nats per byte]",
}
"""Column -> what an axis is called; of TASK/METRIC the metric."""

_WITHOUT_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
# Letters as shapes look alike everywhere, and the same figure is the same file.
_SETTINGS = {
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron_dlm",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
}


def axis_name(column: str) -> str:
    """What an axis is called that shows this column."""
    where, _, metric = column.rpartition("/")
    if where and metric in AXIS_NAMES:
        name, bracket, unit = AXIS_NAMES[metric].partition(" [")
        return f"{name} on {where}{bracket}{unit}"
    return AXIS_NAMES.get(column, column)


def look(number: int) -> dict[str, Any]:
    """color, marker and linestyle of the number-th line of a figure: arguments of `plot`."""
    place, turn = number % len(COLORS), number // len(COLORS)
    return {
        "color": COLORS[place],
        "marker": MARKERS[(place + turn) % len(MARKERS)],
        "linestyle": LINE_STYLES[(place + turn) % len(LINE_STYLES)],
    }


def new_panels(
    number: int, *, max_columns: int = 3, width: float = 3.6, height: float = 3.0
) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels in rows, width x height inches each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    rows = math.ceil(number / max_columns)
    columns = math.ceil(number / rows)  # four panels are two and two, not three and one
    with rc_context(_SETTINGS):
        size = (1.0 + width * columns, 0.8 + height * rows)
        figure = Figure(figsize=size, dpi=150, facecolor="white")
        # Titles keep away from the ticks of the panels above them.
        figure.set_layout_engine("constrained", h_pad=0.08)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[number:]:
        axes.set_visible(False)
    for axes in panels[:number]:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:number]


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """stem.png and stem.svg, each there whole or not at all; equal figures make equal files."""
    from matplotlib import rc_context

    paths = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    with rc_context(_SETTINGS):
        for path in paths:
            save_whole(figure, path, metadata=_WITHOUT_DATE[path.suffix[1:]])
    return paths


def save_whole(figure: Figure, path: Path, **options: Any) -> None:
    """The picture under its name when all of it is written; options are those of `savefig`."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, **options)
    os.replace(temporary, path)
