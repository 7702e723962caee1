"""Loss against learning rate for models of several widths.

    python tools/learning_rate_transfer.py --output_dir runs/learning_rate_transfer

trains every width at every rate on the same bytes. With CompleteP the best rate is the same for all
widths; with standard it falls as the model grows. Writes learning_rate_transfer.csv and
learning_rate_transfer.png. See docs/parametrization.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from size_study import (
    PARAMETRIZATIONS,
    default_model,
    default_optimizer,
    matched_optimizer,
    require_sizes,
    run_study,
)

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.runtime.device import open_device
from megatron_dlm.training.schedule import learning_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED_SHARE = 0.2
"""Of the steps, the last ones, whose mean loss is the result of a run."""
_SHOWN_NATS = 1.5
"""Worse runs than this above the best lie outside the figure."""


@dataclass(frozen=True)
class LearningRateTransferConfig:
    """Loss against learning rate for models of several widths."""

    output_dir: str
    """Directory of the table and the figure."""
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Values of model.hidden_size."""
    rates: list[float] = field(default_factory=lambda: [0.04, 0.08, 0.16, 0.32, 0.64, 1.28])
    """Values of optimizer.lr; the standard models use a rate / model.hidden_size."""
    steps: int = 150
    """Updates of one model."""
    batch_size: int = 8
    """Samples of one update."""
    text: list[str] = field(default_factory=list)
    """Files whose bytes are the text; default: the standard library of Python."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of the weights, the batches and the noise; the loss is the mean over them."""
    model: ModelConfig = field(
        default_factory=lambda: replace(default_model(), hidden_size=32, kv_channels=16)
    )
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: default_optimizer(lr=0.3))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="linear", warmup_steps=10, min_lr_ratio=0.0)
    )

    def __post_init__(self) -> None:
        require_sizes(
            widths=self.widths, rates=self.rates, steps=self.steps, batch_size=self.batch_size
        )
        require(bool(self.seeds), "seeds is empty; give at least one")
        require(
            self.schedule.warmup_steps < self.steps,
            f"schedule.warmup_steps is {self.schedule.warmup_steps}; it must be below steps "
            f"{self.steps}",
        )


@dataclass(frozen=True)
class Row:
    """One trained model."""

    parametrization: str
    width: int
    rate: float
    """As given: the standard model learned at this rate / base width."""
    seed: int
    loss: float
    """Nats per token, the mean over the last fifth of the steps; infinite if it diverged."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return run_study(
        LearningRateTransferConfig,
        argv,
        name="learning_rate_transfer",
        measure=measure,
        draw=draw,
        tell=print_best,
    )


def measure(config: LearningRateTransferConfig) -> list[Row]:
    """Train every width at every rate in both parametrizations; prints a line per model."""
    device = open_device("auto")  # before megatron.core is imported
    from size_trials import Setting, Trial, read_bytes, sized

    from megatron_dlm.runtime.parallel import parallel_context

    base, text = config.model, read_bytes(config.text)
    rows = []
    with parallel_context(ParallelConfig(), device) as parallel:
        for seed, name, width, rate in product(
            config.seeds, PARAMETRIZATIONS, config.widths, config.rates
        ):
            setting = Setting(base, config.objective, config.batch_size, seed, text)
            given = replace(config.optimizer, lr=rate)
            optimizer = matched_optimizer(given, name, base.hidden_size)
            model = sized(base, optimizer, width, base.num_layers)
            trial = Trial(setting, optimizer, model, device=device, parallel=parallel)
            loss = _train(trial.step, optimizer, config)
            rows.append(Row(name, width, rate, seed, loss))
            print(f"{name}, width {width}, rate {rate:g}, seed {seed}: {loss:.4f}", flush=True)
    return rows


def _train(
    update: Callable[[int, float], float],
    optimizer: OptimizerConfig,
    config: LearningRateTransferConfig,
) -> float:
    losses = []
    for step in range(1, config.steps + 1):
        rate = learning_rate(step, config.steps, optimizer, config.schedule)
        losses.append(update(step, rate))
        if not math.isfinite(losses[-1]):
            return math.inf
    measured = losses[-max(1, round(_MEASURED_SHARE * config.steps)) :]
    return sum(measured) / len(measured)


def mean_losses(rows: Sequence[Row], parametrization: str, width: int) -> dict[float, float]:
    """Rate -> loss, the mean over the seeds; one line of the figure."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        if (row.parametrization, row.width) == (parametrization, width):
            losses.setdefault(row.rate, []).append(row.loss)
    return {rate: sum(values) / len(values) for rate, values in sorted(losses.items())}


def print_best(rows: Sequence[Row]) -> None:
    """The best rate of every width."""
    print("\nbest rate")
    for parametrization in PARAMETRIZATIONS:
        for width in sorted({row.width for row in rows}):
            losses = mean_losses(rows, parametrization, width)
            best = min(losses, key=losses.__getitem__)
            print(f"{parametrization}, width {width}: {best:g} with {losses[best]:.4f} nats")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Loss against rate: a panel for each parametrization, a line for each width."""
    from matplotlib.figure import Figure  # needs no display, unlike pyplot

    figure = Figure(figsize=(8, 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(PARAMETRIZATIONS), sharey=True)
    for axes, parametrization in zip(panels, PARAMETRIZATIONS, strict=True):
        _draw_panel(axes, rows, parametrization)
    losses = [row.loss for row in rows]
    best = min(losses)
    require(math.isfinite(best), "every run diverged, there is nothing to draw; give lower rates")
    top = min(max(losses), best + _SHOWN_NATS)
    panels[0].set_ylim(best - 0.05 * (top - best), top)
    figure.savefig(path)


def _draw_panel(axes: Axes, rows: Sequence[Row], parametrization: str) -> None:
    for width in sorted({row.width for row in rows}):
        losses = mean_losses(rows, parametrization, width)
        [line] = axes.plot(list(losses), list(losses.values()), "o-", label=f"width {width}")
        best = min(losses, key=losses.__getitem__)
        axes.plot(best, losses[best], "*", markersize=14, color=line.get_color())
    rates = sorted({row.rate for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate (standard: times the base width)")
    axes.set_ylabel("loss [nats per token]")
    axes.set_title(parametrization)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(main())
