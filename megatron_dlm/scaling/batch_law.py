"""Steps against batch size at equal loss: a hyperbola, whose corner says how large a batch pays.

((S / S_min)^a - 1) ((B / B_min)^a - 1) = 1, with a between 0.1 and 0.2 in section 4 of "Scaling
Behavior of Discrete Diffusion Language Models"; after McCandlish et al. 2018, whose law has
examples for B and no a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from megatron_dlm.scaling.bootstrap import (
    Estimate,
    Floats,
    intervals,
    spread_residuals,
    wild_factors,
)
from megatron_dlm.scaling.descent import descend

_LEAST_SQUARES = 1e3
"""A Huber delta that no residual of a logarithm reaches."""


@dataclass(frozen=True)
class IsoLoss:
    """All (steps, batch size) that reach one loss."""

    min_steps: float
    min_batch_tokens: float
    sharpness: float
    """The exponent a."""

    def steps(self, batch_tokens: float) -> float:
        """Steps that a batch of this size needs; ValueError for one that is too small for any."""
        excess = (batch_tokens / self.min_batch_tokens) ** self.sharpness - 1
        if excess <= 0:
            raise ValueError(
                f"a batch of {batch_tokens:.3g} tokens never reaches this loss; the smallest that "
                f"does is {self.min_batch_tokens:.3g}"
            )
        return float(self.min_steps * (1 + 1 / excess) ** (1 / self.sharpness))

    @property
    def least_tokens_batch(self) -> float:
        """Batch size, in tokens, that reaches the loss with the fewest tokens.

        S B is least where both factors of the law are 1: at 2^(1/a) times either minimum.
        """
        return float(self.min_batch_tokens * 2 ** (1 / self.sharpness))


@dataclass(frozen=True)
class IsoLossFit:
    """A hyperbola, and how sure its numbers are."""

    law: IsoLoss
    intervals: dict[str, Estimate]
    """Its fields, and least_tokens_batch; empty without bootstrap."""


class _Hyperbola:
    """log S of log B, with theta = log S_min, log(log(lowest B / B_min)), log a."""

    names: tuple[str, ...] = ("log_min_steps", "log_gap", "log_sharpness")
    starts: tuple[tuple[float, ...], ...] = (
        (-0.5, -3.0),
        (float(np.log(0.5)), float(np.log(3.0))),
        (float(np.log(0.15)), float(np.log(0.5)), 0.0),
    )
    """The first counts from the fewest steps."""

    def __init__(self, lowest_log_batch: float) -> None:
        self.lowest = lowest_log_batch

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """See `parametric_laws.Law.log_loss`; runs [n, 1] of log B -> log S."""
        log_min_steps, log_gap, log_sharpness = np.moveaxis(theta, -1, 0)[..., None]
        # The smallest batch stays below every batch that reached the loss.
        gap, sharpness = np.exp(log_gap), np.exp(log_sharpness)
        above = runs[:, 0] - self.lowest + gap
        excess = np.expm1(sharpness * above)
        rise = np.log1p(1 / excess) / sharpness
        slopes = [np.ones_like(rise), -gap / excess, -rise - above / excess]
        return log_min_steps + rise, np.stack(slopes)


def fit_iso_loss(
    steps: Sequence[float], batch_tokens: Sequence[float], *, count: int = 0, seed: int = 0
) -> IsoLossFit:
    """Least squares between logarithms of steps, given batch sizes; from several starts.

    With `count` resamples also intervals, from a wild bootstrap. Raises ValueError for fewer than
    three different batch sizes, and for intervals without a fourth point.
    """
    log_s, log_b = (
        np.log(np.asarray(values, dtype=np.float64)) for values in (steps, batch_tokens)
    )
    if len(np.unique(log_b)) < 3:
        raise ValueError("an iso-loss curve needs three different batch sizes; give more runs")
    spare = len(log_s) - len(_Hyperbola.names)
    if count and spare < 1:
        raise ValueError("three points leave nothing to judge an iso-loss curve by; give four")
    law, runs = _Hyperbola(float(log_b.min())), log_b[:, None]
    starts = np.array(list(product(*law.starts)))
    starts[:, 0] += log_s.min()
    ends, costs = descend(law, starts, runs, log_s, delta=_LEAST_SQUARES, max_steps=1000)
    theta = ends[costs.argmin()]
    found = {}
    if count:
        fitted, slopes = law.log_loss(theta, runs)
        spread = spread_residuals(slopes.T, log_s - fitted)
        targets = fitted + wild_factors(range(len(log_s)), spare, count, seed) * spread
        begins = np.tile(theta, (count, 1))
        drawn, _ = descend(law, begins, runs, targets, delta=_LEAST_SQUARES)
        # In logarithms: a flat resample may say any number, and products of it would overflow.
        table = _logarithms(law, drawn)
        names = ("min_steps", "min_batch_tokens", "sharpness", "least_tokens_batch")
        estimates = intervals(_logarithms(law, theta[None])[0].tolist(), table)
        with np.errstate(over="ignore"):
            found = {
                name: Estimate(*(float(np.exp(v)) for v in (e.value, e.low, e.high)))
                for name, e in zip(names, estimates, strict=True)
            }
    log_min_s, log_min_b, log_a, _ = _logarithms(law, theta[None])[0]
    return IsoLossFit(
        IsoLoss(float(np.exp(log_min_s)), float(np.exp(log_min_b)), float(np.exp(log_a))), found
    )


def _logarithms(law: _Hyperbola, theta: Floats) -> Floats:
    """[rows, 4]: of S_min, B_min, a and the batch of fewest tokens."""
    log_min_s, log_gap, log_a = theta.T
    log_min_b = law.lowest - np.exp(log_gap)
    best = log_min_b + np.log(2) / np.exp(log_a)
    return np.stack([log_min_s, log_min_b, log_a, best], axis=1)
