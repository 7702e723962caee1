"""The best size and length that a number of FLOPs can pay, by a parametric law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.parametric_laws import Law

Bools = NDArray[np.bool_]

_NUM_SIZES = 61
_NUM_LENGTHS = 21
_NUM_LEVELS = 5
_MARGIN = 2
"""Every level looks closer, from so many grid points below the best ones to as many above."""
_OUTERMOST = 0.002
_AT_ONCE = 200_000


@dataclass(frozen=True)
class Plans:
    """All plans: from one parameter to the size of which the FLOPs pay one token.

    A plan is a point of the unit square: the place of the size in logarithms, and the place of the
    tokens between one epoch (or what can be paid, if that is less) and all that can be paid.
    """

    flops: float
    unique_tokens: float
    flops_per_token: tuple[float, float]
    """Coefficient and exponent, in the parameters; both above 0."""

    def at(self, points: Floats) -> Floats:
        """[n, 2] of the unit square -> [n, 3]: logarithms of parameters, unique tokens, epochs."""
        coefficient, exponent = self.flops_per_token
        affordable = np.log(self.flops / coefficient)
        log_size = points[:, 0] * affordable / exponent
        most = affordable - exponent * log_size
        first = np.minimum(most, np.log(self.unique_tokens))
        log_tokens = first + points[:, 1] * (most - first)
        unique = np.minimum(log_tokens, np.log(self.unique_tokens))
        return np.stack([log_size, unique, log_tokens - unique], axis=1)

    def best(self, law: Law, thetas: Floats, *, may_stop: bool) -> tuple[Floats, Bools]:
        """[r, 3]: the plans with the lowest loss by thetas [r, k], and [r]: is its size inside.

        A size at one of the ends is no best size. may_stop: fewer tokens than the FLOPs pay are
        tried too. Of many thetas the outermost 0.2 % on either side, and those with a size at an
        end, are found only up to where the others end, which leaves 95 % intervals as they are.
        """
        low, high = np.zeros(2), np.ones(2)
        if not may_stop:
            low[1] = 1.0
        counts = (_NUM_SIZES, _NUM_LENGTHS if may_stop else 1)
        is_inside = np.ones(len(thetas), dtype=np.bool_)
        for level in range(_NUM_LEVELS):
            axes = [np.linspace(*ends) for ends in zip(low, high, counts, strict=True)]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
            points = grid[_lowest(law, thetas, self.at(grid))]
            if level == 0:
                is_inside = (points[:, 0] > low[0]) & (points[:, 0] < high[0])
            step = (high - low) / np.maximum(np.array(counts) - 1, 1)
            inner = points[is_inside] if is_inside.any() else points
            first, last = np.quantile(inner, [_OUTERMOST, 1 - _OUTERMOST], axis=0)
            low = np.maximum(first - _MARGIN * step, low)
            high = np.minimum(last + _MARGIN * step, high)
        return self.at(points), is_inside


def _lowest(law: Law, thetas: Floats, plans: Floats) -> NDArray[np.int64]:
    """[r]: the plan [n, 3] with the lowest loss by every theta, some thetas at once."""
    size = max(_AT_ONCE // len(plans), 1)
    parts = [
        law.log_loss(thetas[start : start + size], plans)[0].argmin(axis=1)
        for start in range(0, len(thetas), size)
    ]
    return np.concatenate(parts)
