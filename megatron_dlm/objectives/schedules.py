"""Noise schedules: alpha(t) is the probability that a token is still clean at time t.

alpha(0) = 1, alpha(1) = 0. The bound is the integral over t of -alpha'(t) / (1 - alpha(t)) times
the expected cross entropy of the masked tokens (MDLM, arXiv 2406.07524; MD4, arXiv 2406.04329); it
does not depend on the schedule. Times and results are float64 tensors of any one shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """alpha(t) and what follows from it, for times in (0, 1]."""

    def mask_rate(self, time: Tensor) -> Tensor:
        """1 - alpha(t): the probability that a token is masked."""

    def elbo_weight(self, time: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): the weight of a masked token's cross entropy."""

    def alpha(self, time: Tensor) -> Tensor:
        """The probability that a token is clean."""


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t, so a token is masked with probability t and weighs 1/t."""

    def mask_rate(self, time: Tensor) -> Tensor:
        return time

    def elbo_weight(self, time: Tensor) -> Tensor:
        return 1.0 / time

    def alpha(self, time: Tensor) -> Tensor:
        return 1.0 - time


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): mask rate sin(pi/2 t), weight pi/2 cot(pi/2 t)."""

    def mask_rate(self, time: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * time)

    def elbo_weight(self, time: Tensor) -> Tensor:
        return 0.5 * math.pi / torch.tan(0.5 * math.pi * time)

    def alpha(self, time: Tensor) -> Tensor:
        return 1.0 - torch.sin(0.5 * math.pi * time)


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t^w: mask rate t^w, weight w/t."""

    exponent: float

    def mask_rate(self, time: Tensor) -> Tensor:
        return time**self.exponent

    def elbo_weight(self, time: Tensor) -> Tensor:
        return self.exponent / time

    def alpha(self, time: Tensor) -> Tensor:
        return 1.0 - time**self.exponent


def build_schedule(name: str, exponent: float) -> Schedule:
    """The schedule that objective.schedule names; the exponent is w of the polynomial one."""
    schedules: dict[str, Schedule] = {
        "linear": Linear(),
        "cosine": Cosine(),
        "polynomial": Polynomial(exponent),
    }
    return schedules[name]
