"""Steps against batch size at equal loss: a hyperbola, whose corner says how large a batch pays.

((S / S_min)^a - 1) ((B / B_min)^a - 1) = 1, with a between 0.1 and 0.2 in section 4 of "Scaling
Behavior of Discrete Diffusion Language Models"; after McCandlish et al. 2018, whose law has
examples for B and no a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from megatron_dlm.scaling.bootstrap import Floats


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


def fit_iso_loss(steps: Sequence[float], batch_tokens: Sequence[float]) -> IsoLoss:
    """Least squares between logarithms of steps, given batch sizes; from several starts.

    Raises ValueError for fewer than three different batch sizes.
    """
    log_s, log_b = (
        np.log(np.asarray(values, dtype=np.float64)) for values in (steps, batch_tokens)
    )
    if len(np.unique(log_b)) < 3:
        raise ValueError("an iso-loss curve needs three different batch sizes; give more runs")

    def residuals(theta: Floats) -> Floats:
        log_min_s, log_gap, log_a = theta
        sharpness = np.exp(log_a)
        # The smallest batch stays below every batch that reached the loss.
        log_min_b = log_b.min() - np.exp(log_gap)
        excess = np.expm1(sharpness * (log_b - log_min_b))
        values: Floats = log_min_s + np.log1p(1 / excess) / sharpness - log_s
        return values

    starts = [
        (log_s.min() - drop, np.log(gap), np.log(a))
        for drop in (0.5, 3.0)
        for gap in (0.5, 3.0)
        for a in (0.15, 0.5, 1.0)
    ]
    with np.errstate(over="ignore"):
        tries = [least_squares(residuals, start) for start in starts]
    best = min(tries, key=lambda found: found.cost)
    log_min_s, log_gap, log_a = best.x
    return IsoLoss(
        float(np.exp(log_min_s)),
        float(np.exp(log_b.min() - np.exp(log_gap))),
        float(np.exp(log_a)),
    )
