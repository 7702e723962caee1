"""What a run does when something goes wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.checks import require


@dataclass(frozen=True)
class RecoveryConfig:
    """Hangs, NaN, loss spikes, slow ranks."""

    hang_timeout_minutes: float = 30.0
    """Without a finished step for this long, every rank writes its stacks and the run ends; 0
    waits for ever. The first step, a validation and a save have three times as long."""
    on_bad_step: Literal["stop", "rollback"] = "stop"
    """After NaN, infinity or a loss spike: end the run, or go back to the newest checkpoint and
    leave out the batches from there up to the bad one; the number of updates stays."""
    spike_factor: float | None = None
    """A loss above this times the mean of the last spike_window_steps is a spike, once there were
    so many; costs one small all-reduce a step. Default: only NaN and infinity are bad."""
    spike_window_steps: int = 100
    """Steps whose mean loss a spike is measured against."""
    max_rollbacks: int = 3
    """Rollbacks of a run, over all its starts, before it ends."""
    straggler_factor: float = 1.5
    """Ranks whose own time per step (forward passes and waiting for data) is above this times the
    median of their pipeline stage are named in the log; 0 names none."""

    def __post_init__(self) -> None:
        require(
            self.hang_timeout_minutes >= 0,
            f"recovery.hang_timeout_minutes is {self.hang_timeout_minutes}; it must be at least 0",
        )
        factor = self.spike_factor
        require(
            factor is None or factor > 1,
            f"recovery.spike_factor is {factor}; it must be greater than 1",
        )
        for name in ("spike_window_steps", "max_rollbacks"):
            value = getattr(self, name)
            require(value > 0, f"recovery.{name} is {value}; it must be greater than 0")
        straggler = self.straggler_factor
        require(
            straggler == 0 or straggler > 1,
            f"recovery.straggler_factor is {straggler}; it must be 0 or greater than 1",
        )
