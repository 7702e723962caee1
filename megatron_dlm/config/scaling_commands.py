"""Configurations of the `scaling` commands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.schema import RunConfig

LawName = Literal[
    "isoflop", "chinchilla", "repeated", "overfitted", "power", "batch", "learning_rate"
]
Convention = Literal["six_n", "six_p_and_attention", "fine"]
NoiseName = Literal["masked", "low-uniform", "balanced", "high-uniform", "uniform"]


@dataclass(frozen=True)
class ScalingFitConfig:
    """Fit a scaling law to results of `study gather`, and write it with its intervals."""

    results: list[str]
    """Tables of `study gather`, .csv or .parquet; runs of several are fitted together."""
    law: LawName
    """isoflop: best size, tokens and loss by compute. chinchilla, repeated, overfitted: loss by
    parameters, unique tokens and epochs. power: y by x. batch: best batch size by tokens.
    learning_rate: best learning rate by batch size. Formulas are in docs/scaling.md."""
    output: str
    """JSON file of the law."""
    by: str | None = None
    """Column, such as an axis of the study: one law for each of its values."""
    only: dict[str, str] = field(default_factory=dict)
    """Only runs that have this value in this column: --only.objective masked."""
    metric: str = "nelbo"
    """Validation metric, in nats, lower is better."""
    score: Literal["last", "best"] = "last"
    """Which validation of a run is its loss: the last one, or the lowest one."""
    convention: Convention = "six_p_and_attention"
    """How FLOPs are counted: six_n 6N, six_p_and_attention 6P + 12 L d S, fine every product."""
    parameters: Literal["without_embeddings", "all"] = "without_embeddings"
    """What the size of a model is in the laws of parameters."""
    budgets: list[float] = field(default_factory=list)
    """isoflop: compute budgets in FLOPs at which curves are read; default: num_budgets."""
    num_budgets: int = 6
    """isoflop: so many budgets, evenly in logarithms, where the curves of four sizes overlap (or of
    three, with two runs each)."""
    models: Literal["all", "best"] = "all"
    """isoflop: all runs count alike, or of each size only the best at a budget (for grids of batch
    sizes and learning rates)."""
    weighting: Literal["equal", "precision"] = "equal"
    """isoflop: the optima of all budgets count alike, or by how well the sizes of each surround
    it."""
    num_levels: int = 5
    """batch: losses at which the batch sizes are compared."""
    x: str | None = None
    """power: column of x, such as num_parameters, tokens or training_flops."""
    y: str | None = None
    """power: column of y; default: the metric."""
    resamples: int = 1000
    """Resamples that the 95 % intervals come from."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        require(bool(self.results), "results is empty; name a table of `study gather`")
        require(self.output.endswith(".json"), f"output is {self.output}; a law is a file .json")
        require(
            self.resamples >= 100,
            f"resamples is {self.resamples}; an interval needs 100 or more",
        )
        for budget in self.budgets:
            require(budget > 0, f"budgets has {budget:g}; a budget must be greater than 0")
        for name in ("num_budgets", "num_levels"):
            value = getattr(self, name)
            require(value >= 2, f"{name} is {value}; it must be at least 2")
        require(
            self.law != "power" or self.x is not None,
            "law power needs x; give a column such as num_parameters, tokens or training_flops",
        )
        self._refuse_what_is_not_used()

    def _refuse_what_is_not_used(self) -> None:
        """A setting of another law would be left aside without a word."""
        owners: dict[str, tuple[str, object]] = {
            "x": ("power", None),
            "y": ("power", None),
            "budgets": ("isoflop", []),
            "num_budgets": ("isoflop", 6),
            "num_levels": ("batch", 5),
            "models": ("isoflop", "all"),
            "weighting": ("isoflop", "equal"),
        }
        for name, (law, default) in owners.items():
            value = getattr(self, name)
            require(
                self.law == law or value == default,
                f"{name} is {value}, but the law {self.law} does not use it; only {law} does",
            )
        require(
            not self.budgets or self.num_budgets == 6,
            f"num_budgets is {self.num_budgets}, but budgets names them; leave one of them out",
        )


@dataclass(frozen=True)
class ScalingRecommendConfig:
    """What to train with so much data and compute, by which law, and where that was measured."""

    unique_tokens: float
    """Tokens of training data that there are."""
    flops: float
    """Training FLOPs that may be spent."""
    laws: list[str] = field(default_factory=list)
    """Files of `scaling fit`; they stand before the published laws."""
    convention: Convention = "six_p_and_attention"
    """How `flops` counts; laws that were fitted under another one are refused."""
    noise_type: NoiseName | None = None
    """Noise of the diffusion model by the published laws; default: all five."""
    seq_length: int = 2048
    """Tokens of a sample, for attention in the FLOPs of published laws."""
    output: str | None = None
    """Also write everything to this JSON file."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        numbers = {
            "unique_tokens": self.unique_tokens,
            "flops": self.flops,
            "seq_length": self.seq_length,
        }
        for name, value in numbers.items():
            require(value > 0, f"{name} is {value:g}; it must be greater than 0")
            require(math.isfinite(value), f"{name} is {value:g}; give a finite number")
        require(
            self.convention != "fine" or bool(self.laws),
            "no published law counts FLOPs as fine does; give --laws fitted under it, or another "
            "--convention",
        )


@dataclass(frozen=True)
class ScalingFlopsConfig(RunConfig):
    """FLOPs of a run as each paper counts them, and what generating with its model costs."""

    new_tokens: list[int] = field(default_factory=lambda: [16, 64, 256, 1024, 4096])
    """Lengths of the generated text."""
    prompt_tokens: int = 0
    """Tokens in front of it."""
    num_steps: list[int] = field(default_factory=list)
    """Denoising steps of diffusion; beside one for each new token, which is always shown."""
    gpu: str = "H100"
    """GPU whose hours and energy are reckoned."""
    mfu: float = 0.4
    """Share of its peak that training reaches."""
    gpu_watts: float | None = None
    """Draw of one GPU with its share of the machine; given, energy is reckoned."""
    output: str | None = None
    """Also write every number to this JSON file."""

    def __post_init__(self) -> None:
        require(bool(self.new_tokens), "new_tokens is empty; give at least one length")
        for tokens in self.new_tokens:
            require(tokens > 0, f"new_tokens has {tokens}; a length must be greater than 0")
        require(
            self.prompt_tokens >= 0,
            f"prompt_tokens is {self.prompt_tokens}; it must be at least 0",
        )
        for steps in self.num_steps:
            require(steps > 0, f"num_steps has {steps}; it must be greater than 0")
        require(self.gpu in GPUS, f"gpu {self.gpu} is none of {', '.join(GPUS)}")
        require(0 < self.mfu <= 1, f"mfu is {self.mfu}; it must lie in (0, 1]")
        require(
            self.gpu_watts is None or self.gpu_watts > 0,
            f"gpu_watts is {self.gpu_watts}; it must be greater than 0",
        )
