"""Means over many steps with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Mean over steps with its standard error, from prepare and loss."""

    mean: float
    standard_error: float

    def agrees_with(self, exact: float, *, resolution: float) -> None:
        assert self.standard_error < resolution
        assert abs(self.mean - exact) < 4 * self.standard_error + 1e-6, (self, exact)


def ratio_estimate(pairs: np.ndarray) -> Estimate:
    """Sum of totals over sum of counts; the error of a ratio by its linearisation."""
    totals, counts = pairs.T
    ratio = totals.sum() / counts.sum()
    residuals = (totals - ratio * counts) / counts.mean()
    return Estimate(ratio, residuals.std(ddof=1) / math.sqrt(len(totals)))
