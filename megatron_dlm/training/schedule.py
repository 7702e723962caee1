"""The learning rate as a pure function of the step; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_dlm.config.optimizer import OptimizerConfig, ScheduleConfig

# Share of the way from the final rate (0) to the peak (1), after a fraction r of the decay.
_DECAYS = {
    "exponential": lambda r: 2 * 0.5**r - 1,  # as Megatron's WSD: halves, then reaches 0 at r = 1
    "linear": lambda r: 1 - r,
    "one_minus_sqrt": lambda r: 1 - math.sqrt(r),
    "cosine": lambda r: 0.5 * (1 + math.cos(math.pi * r)),
}


def learning_rate(
    step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """Learning rate of update number `step`, counted from 1 to `total_steps`.

    The warmup rises in a straight line and reaches the peak at step `warmup_steps`. After it the
    rate is min + coefficient * (peak - min) with min = min_lr_ratio * peak; it reaches min at
    `total_steps` and stays there. constant stays at the peak. wsd stays at the peak until the last
    `decay_fraction` of all steps, which starts after the warmup at the earliest.
    """
    assert step >= 1, f"steps count from 1, got {step}"
    peak = optimizer.lr
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay: str = schedule.kind
    first = schedule.warmup_steps
    if schedule.kind == "wsd":
        decay = schedule.decay_kind
        first = max(first, total_steps - round(schedule.decay_fraction * total_steps))
    if step <= first:
        return peak
    fraction = min(1.0, (step - first) / max(1, total_steps - first))
    minimum = schedule.min_lr_ratio * peak
    return minimum + _DECAYS[decay](fraction) * (peak - minimum)
