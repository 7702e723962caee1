"""How far activations move in a few updates, at growing width and depth.

    python tools/coordinate_check.py --output_dir runs/coordinate_check

trains models of several sizes on the same bytes and compares their activations on a fixed batch
before and after. With CompleteP the changes do not depend on the size of the model; with standard
they grow. Writes coordinate_check.csv and coordinate_check.png. See docs/parametrization.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from size_study import (
    PARAMETRIZATIONS,
    default_model,
    default_optimizer,
    matched_optimizer,
    require_sizes,
    run_study,
)

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.runtime.device import open_device

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("width", "depth")


@dataclass(frozen=True)
class CoordinateCheckConfig:
    """How far activations move in a few updates, against width and depth."""

    output_dir: str
    """Directory of the table and the figure."""
    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    """Values of model.hidden_size, at model.num_layers."""
    depths: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    """Values of model.num_layers, at model.hidden_size."""
    steps: int = 4
    """Updates between the two looks at the activations."""
    batch_size: int = 4
    """Samples of one update."""
    text: list[str] = field(default_factory=list)
    """Files whose bytes are the text; default: the standard library of Python."""
    seed: int = 1
    """Seed of the weights, the batches and the noise."""
    model: ModelConfig = field(default_factory=default_model)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: default_optimizer(lr=0.1))

    def __post_init__(self) -> None:
        require_sizes(
            widths=self.widths, depths=self.depths, steps=self.steps, batch_size=self.batch_size
        )


@dataclass(frozen=True)
class Row:
    """Root mean squares of one kind of activation in one model."""

    parametrization: str
    axis: str
    size: int
    quantity: str
    start: float
    end: float
    change: float
    """Of the difference between end and start."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return run_study(
        CoordinateCheckConfig,
        argv,
        name="coordinate_check",
        measure=measure,
        draw=draw,
        tell=print_slopes,
    )


def measure(config: CoordinateCheckConfig) -> list[Row]:
    """Train all sizes in both parametrizations; prints a line per model."""
    device = open_device("auto")  # before megatron.core is imported
    from activation_sizes import activation_sizes
    from size_trials import Setting, Trial, read_bytes, sized

    from megatron_dlm.runtime.parallel import parallel_context

    base, text = config.model, read_bytes(config.text)
    setting = Setting(base, config.objective, config.batch_size, config.seed, text)
    sizes = [("width", width, width, base.num_layers) for width in config.widths]
    sizes += [("depth", depth, base.hidden_size, depth) for depth in config.depths]
    rows: list[Row] = []
    with parallel_context(ParallelConfig(), device) as parallel:
        for name in PARAMETRIZATIONS:
            optimizer = matched_optimizer(config.optimizer, name, base.hidden_size)
            for axis, size, width, depth in sizes:
                model = sized(base, optimizer, width, depth)
                trial = Trial(setting, optimizer, model, device=device, parallel=parallel)
                found = activation_sizes(trial, optimizer.lr, config.steps)
                rows += [Row(name, axis, size, key, **vars(value)) for key, value in found.items()]
                shown = "  ".join(f"{key} {value.change:.3g}" for key, value in found.items())
                print(f"{name}, {axis} {size}: change of {shown}", flush=True)
    return rows


def select(rows: Sequence[Row], parametrization: str, axis: str, quantity: str) -> list[Row]:
    """One line of the figure."""
    key = (parametrization, axis, quantity)
    return [row for row in rows if (row.parametrization, row.axis, row.quantity) == key]


def quantities(rows: Sequence[Row]) -> list[str]:
    """Names of the activations, in the order of the model."""
    return list(dict.fromkeys(row.quantity for row in rows))


def print_slopes(rows: Sequence[Row]) -> None:
    """Exponent of the size in the change: the least-squares line in logarithms."""
    names = quantities(rows)
    print("\nexponent of the size in the change of the activations (0: flat)")
    print(f"{'':20}" + "".join(f"{name:>11}" for name in names))
    for parametrization in PARAMETRIZATIONS:
        for axis in AXES:
            lines = [select(rows, parametrization, axis, name) for name in names]
            if any(len(line) < 2 for line in lines):
                continue
            sizes = np.log([row.size for row in lines[0]])
            changes = np.log([[row.change for row in line] for line in lines])
            slopes = np.polyfit(sizes, changes.T, 1)[0]
            shown = "".join(f"{value:11.2f}" for value in slopes)
            print(f"{parametrization + ', ' + axis:20}{shown}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Change against size: a column for each parametrization, a row for width and for depth."""
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    figure = Figure(figsize=(8, 6.6), dpi=100, layout="constrained")
    grid = figure.subplots(len(AXES), len(PARAMETRIZATIONS), sharex="row", sharey=True)
    for line, axis in zip(grid, AXES, strict=True):
        for axes, parametrization in zip(line, PARAMETRIZATIONS, strict=True):
            _draw_panel(axes, rows, parametrization, axis)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.suptitle("Change of activations in a few updates")
    figure.savefig(path)


def _draw_panel(axes: Axes, rows: Sequence[Row], parametrization: str, axis: str) -> None:
    for name in quantities(rows):
        line = select(rows, parametrization, axis, name)
        axes.plot([row.size for row in line], [row.change for row in line], "o-", label=name)
    sizes = sorted({row.size for row in rows if row.axis == axis})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel(axis)
    axes.set_ylabel("root mean square of the change")
    axes.set_title(parametrization)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(main())
