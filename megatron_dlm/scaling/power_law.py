"""y = A x^a: fitted as a straight line between logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import (
    Estimate,
    Floats,
    intervals,
    spread_residuals,
    wild_factors,
)


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float) -> float:
        """y at x > 0."""
        return float(self.coefficient * x**self.exponent)

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
    drawn: Floats
    """[resamples, 2]: coefficient and exponent."""


def fit_power_law(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
) -> PowerLaw:
    """Least squares between log x and log y, each point with its weight.

    Raises ValueError for values that are not positive and for fewer than two different x.
    """
    log_x, log_y, weight = _checked(x, y, weights)
    coefficient, exponent = lines(log_x, log_y[None], weight)[0]
    return PowerLaw(float(coefficient), float(exponent))


def fit_with_intervals(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    *,
    weights: Sequence[float] | Floats | None = None,
    labels: Sequence[object] | None = None,
    count: int = 1000,
    seed: int = 0,
) -> PowerLawFit:
    """`fit_power_law` with intervals from a wild bootstrap; points of one label err together.

    Raises ValueError as well where two numbers leave nothing to judge them by: fewer than three
    points.
    """
    log_x, log_y, weight = _checked(x, y, weights)
    names = list(range(len(log_x))) if labels is None else list(labels)
    spare = len(set(names)) - 2
    if spare < 1:
        raise ValueError(
            f"{len(set(names))} points leave nothing to judge a power law by; give three or more"
        )
    coefficient, exponent = lines(log_x, log_y[None], weight)[0]
    fitted = np.log(coefficient) + exponent * log_x
    root = np.sqrt(weight)
    design = root[:, None] * np.stack([np.ones_like(log_x), log_x - log_x.mean()], axis=1)
    weighted = spread_residuals(design, root * (log_y - fitted))
    spread = np.divide(weighted, root, out=np.zeros_like(root), where=root > 0)
    drawn = lines(log_x, fitted + wild_factors(names, spare, count, seed) * spread, weight)
    factor, power = intervals([coefficient, exponent], drawn)
    law = PowerLaw(float(coefficient), float(exponent))
    share = r_squared(law, np.exp(log_x), np.exp(log_y), weight)
    return PowerLawFit(law, factor, power, share, drawn)


def lines(log_x: Floats, log_y: Floats, weight: Floats) -> Floats:
    """[rows, 2]: coefficient and exponent of every row of log_y [rows, n].

    log_x [n] or [rows, n]; weights [n]. Points that are NaN are left out of their row; a row of
    which fewer than two are left is NaN.
    """
    log_x = np.broadcast_to(log_x, log_y.shape)
    known = np.isfinite(log_x) & np.isfinite(log_y)
    x, y = np.where(known, log_x, 0.0), np.where(known, log_y, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = weight * known
        share = share / share.sum(axis=1, keepdims=True)
        mean_x, mean_y = (share * x).sum(axis=1), (share * y).sum(axis=1)
        centred = share * (x - mean_x[:, None])
        spread = (centred * x).sum(axis=1)
        exponents = (centred * y).sum(axis=1) / np.where(spread > 1e-18, spread, np.nan)
        return np.stack([np.exp(mean_y - exponents * mean_x), exponents], axis=1)


def r_squared(law: PowerLaw, x: Floats, y: Floats, weight: Floats | None = None) -> float:
    """Share of the variance of log y that the law explains; 0 where all y are equal."""
    log_y = np.log(y)
    residual = log_y - np.log(law.coefficient) - law.exponent * np.log(x)
    mean = np.average(log_y, weights=weight)
    total = float(np.average((log_y - mean) ** 2, weights=weight))
    if total <= 1e-24:
        return 0.0
    return float(1 - np.average(residual**2, weights=weight) / total)


def _checked(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None,
) -> tuple[Floats, Floats, Floats]:
    x_values, y_values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.all(x_values > 0) and np.all(y_values > 0)):
        raise ValueError("a power law needs positive numbers; leave the others out")
    log_x = np.log(x_values)
    weight = np.ones_like(log_x) if weights is None else np.asarray(weights, dtype=np.float64)
    different = log_x[weight > 0]
    if len(different) == 0 or np.ptp(different) <= 1e-9:
        raise ValueError("a power law needs points at two different x at least")
    return log_x, np.log(y_values), weight
