"""y = A x^a: fitted as a straight line between logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, estimates


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float) -> float:
        """y at x > 0."""
        return float(self.coefficient * x**self.exponent)

    def inverse(self, y: float) -> float:
        """The x with this y."""
        return float((y / self.coefficient) ** (1 / self.exponent))

    def __str__(self) -> str:
        return f"{self.coefficient:.4g} x^{self.exponent:.4g}"


@dataclass(frozen=True)
class PowerLawFit:
    """A power law, how sure its numbers are, and how much of the variation it explains."""

    law: PowerLaw
    coefficient: Estimate
    exponent: Estimate
    r_squared: float
    """Of the logarithms."""


def fit_power_law(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
) -> PowerLaw:
    """Least squares between log x and log y, each point with its weight.

    Raises ValueError for values that are not positive and for fewer than two different x.
    """
    x_values, y_values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.all(x_values > 0) and np.all(y_values > 0)):
        raise ValueError("a power law needs positive numbers; leave the others out")
    log_x, log_y = np.log(x_values), np.log(y_values)
    weight = np.ones_like(log_x) if weights is None else np.asarray(weights, dtype=np.float64)
    total = weight.sum()
    mean_x, mean_y = (weight * log_x).sum() / total, (weight * log_y).sum() / total
    spread = (weight * (log_x - mean_x) ** 2).sum()
    if spread <= 1e-18 * total:
        raise ValueError("a power law needs points at two different x at least")
    exponent = (weight * (log_x - mean_x) * (log_y - mean_y)).sum() / spread
    return PowerLaw(float(np.exp(mean_y - exponent * mean_x)), float(exponent))


def fit_with_intervals(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    *,
    weights: Sequence[float] | Floats | None = None,
    count: int = 1000,
    seed: int = 0,
) -> PowerLawFit:
    """`fit_power_law` with bootstrap intervals over the points."""
    x_values, y_values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    weight = np.ones_like(x_values) if weights is None else np.asarray(weights, dtype=np.float64)

    def fit(chosen: np.ndarray) -> tuple[float, float]:
        law = fit_power_law(x_values[chosen], y_values[chosen], weight[chosen])
        return law.coefficient, law.exponent

    coefficient, exponent = estimates(fit, len(x_values), count=count, seed=seed)
    law = PowerLaw(coefficient.value, exponent.value)
    return PowerLawFit(law, coefficient, exponent, r_squared(law, x_values, y_values))


def r_squared(law: PowerLaw, x: Floats, y: Floats) -> float:
    """Share of the variance of log y that the law explains."""
    log_y = np.log(y)
    residual = log_y - np.log(law.coefficient) - law.exponent * np.log(x)
    return float(1 - residual.var() / log_y.var())
