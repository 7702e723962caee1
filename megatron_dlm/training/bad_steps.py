"""Which steps are bad: NaN, infinity, or a loss far above those before it."""

from __future__ import annotations

import math
from collections import deque

from megatron_dlm.checkpoint.state import TrainState
from megatron_dlm.config.recovery import RecoveryConfig
from megatron_dlm.training.metrics import Metrics


class BadStep(Exception):
    """An update that must not be built upon. Raised on all ranks at the same step."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason


class StepJudge:
    """Looks at every step; what it remembers is part of the checkpoint, so that a resumed run
    judges like one that was never interrupted."""

    def __init__(self, recovery: RecoveryConfig, start: TrainState) -> None:
        self._factor = recovery.spike_factor
        self._window = recovery.spike_window_steps
        self._losses = deque(start.recent_losses, maxlen=self._window)
        self._before = list(start.pending_metrics.get("loss", [0.0, 0.0]))

    @property
    def recent_losses(self) -> list[float]:
        """For the checkpoint; empty where spikes are not looked for."""
        return list(self._losses)

    def judge(self, step: int, grad_norm: float, metrics: Metrics) -> None:
        """Raise BadStep. Where spikes are looked for, one small all-reduce: collective."""
        if not math.isfinite(grad_norm):  # the norm is the same on all ranks
            raise BadStep(step, f"the gradient norm is {grad_norm} at step {step}")
        if self._factor is None:
            return
        loss = self._loss_of_this_step(metrics)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise BadStep(step, f"the loss is {loss} at step {step}")
        mean = sum(self._losses) / max(1, len(self._losses))
        if len(self._losses) == self._window and loss > self._factor * mean:
            raise BadStep(
                step,
                f"the loss {loss:.4g} at step {step} is {loss / mean:.1f} times the mean of the "
                f"{self._window} steps before it (recovery.spike_factor {self._factor:g})",
            )
        self._losses.append(loss)

    def reported(self) -> None:
        """The metrics were reduced and start from zero."""
        self._before = [0.0, 0.0]

    def _loss_of_this_step(self, metrics: Metrics) -> float | None:
        """None for a batch without a counted slot."""
        total, count = metrics.pending()["loss"]
        (old_total, old_count), self._before = self._before, [total, count]
        return (total - old_total) / (count - old_count) if count > old_count else None
