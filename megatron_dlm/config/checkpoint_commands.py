"""Configuration of the `megatron-dlm checkpoint` commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require


@dataclass(frozen=True)
class CheckpointInspectConfig:
    """Show what a checkpoint holds: step, model, tensors by their global shapes, sizes of files."""

    checkpoint: str
    """Run directory (its newest whole checkpoint is taken) or one checkpoint, iter_NNNNNNN."""
    step: int | None = None
    """Take the checkpoint of this step of the run."""
    optimizer: bool = False
    """List the tensors of the optimizer too, not only their sum."""
    output: str | None = None
    """Also write everything, the configuration included, to this JSON file."""


@dataclass(frozen=True)
class CheckpointVerifyConfig:
    """Read every file of checkpoints and compare it with the checksum that was written."""

    checkpoint: list[str]
    """Run directories (all their checkpoints are read) or single checkpoints, iter_NNNNNNN."""

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint is empty; name a run directory or a checkpoint")


@dataclass(frozen=True)
class CheckpointPruneConfig:
    """Delete old checkpoints of a run; what is kept must be sound."""

    run: str
    """Run directory that no job is working in."""
    keep_last: int = 2
    """Keep the newest N whole checkpoints."""
    keep_every_steps: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_steps: list[int] = field(default_factory=list)
    """Also keep the checkpoints of these steps."""
    damaged: bool = False
    """Also delete what verification has set aside (iter_NNNNNNN.damaged)."""
    dry_run: bool = False
    """Say what would be deleted, and delete nothing."""

    def __post_init__(self) -> None:
        require(
            self.keep_last > 0,
            f"keep_last is {self.keep_last}; at least 1 is kept, delete the run itself for none",
        )
        every = self.keep_every_steps
        require(
            every is None or every > 0, f"keep_every_steps is {every}; it must be greater than 0"
        )


@dataclass(frozen=True)
class CheckpointAverageConfig:
    """Average the weights of several checkpoints of a run into a new one to train, export or
    evaluate from."""

    run: str
    """Run directory."""
    output_dir: str
    """Run directory to make: checkpoints/iter_0000000 with the averaged weights, no moments."""
    last: int | None = None
    """Average the newest N whole checkpoints. Give this or steps."""
    steps: list[int] = field(default_factory=list)
    """Average the checkpoints of these steps."""
    kind: Literal["mean", "ema"] = "mean"
    """mean: all count alike; ema: exponential moving average from the oldest to the newest."""
    decay: float = 0.9
    """ema: what is kept of the average when the next checkpoint comes in."""
    dtype: Literal["same", "fp32", "bf16"] = "same"
    """Type of the weights that are written; same keeps the run's. Sums are fp32, and of the fp32
    weights where the checkpoints hold them."""

    def __post_init__(self) -> None:
        require(
            (self.last is None) == bool(self.steps),
            "give either last (how many of the newest) or steps (which ones)",
        )
        require(
            self.last is None or self.last > 1, f"last is {self.last}; an average is of 2 or more"
        )
        require(
            not self.steps or len(set(self.steps)) > 1,
            f"steps is {self.steps}; an average is of 2 or more",
        )
        require(0 < self.decay < 1, f"decay is {self.decay}; it must lie in (0, 1)")
