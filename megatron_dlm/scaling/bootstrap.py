"""Intervals: what a fit would have said had other runs of the same kind been made.

Two ways, both for all resamples at once:

- cases: runs are drawn with replacement. For laws that are not linear, with many runs.
- wild: the runs stay, each keeps its place in the design, and its residual comes back with a random
  factor. For lines and parabolas, which may have few runs: a design of five sizes cannot lose one.
  Residuals are divided by sqrt(1 - leverage) [MacKinnon and White 1985, HC2; Wu 1986] and share one
  Student factor, as their variance is known from few of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def case_weights(num_items: int, count: int, seed: int) -> Floats:
    """[count, num_items]: how often each item is in each of `count` draws with replacement."""
    random = np.random.default_rng(seed)
    shares = np.full(num_items, 1 / num_items)
    return random.multinomial(num_items, shares, size=count).astype(np.float64)


def wild_factors(labels: Sequence[object], spare: float, count: int, seed: int) -> Floats:
    """[count, items]: what each residual is multiplied with; items of one label share a factor.

    spare: how many more labels there are than numbers fitted. The factors are Student's t with as
    many degrees of freedom: a common part per resample, and a normal part per label.
    """
    assert spare > 0, spare
    random = np.random.default_rng(seed)
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    normal = random.normal(size=(count, len(places)))
    common = np.sqrt(spare / random.chisquare(spare, size=(count, 1)))
    return (common * normal)[:, [places[label] for label in labels]]


def spread_residuals(design: Floats, residuals: Floats) -> Floats:
    """Residuals [n] of least squares on design [n, k], each divided by sqrt(1 - its leverage)."""
    leverage = np.einsum("nk,kn->n", design, np.linalg.pinv(design))
    free = 1 - leverage
    # A run that alone fixes a number of the fit has no residual to learn from.
    return np.where(free > 1e-9, residuals / np.sqrt(np.maximum(free, 1e-9)), 0.0)


def intervals(values: Sequence[float], drawn: Floats, *, level: float = 0.95) -> list[Estimate]:
    """Percentile intervals of the columns of drawn [resamples, k] around values [k].

    A resample that could not be fitted has a NaN and is left out; ValueError if more than half are.
    """
    whole = drawn[np.isfinite(drawn).all(axis=1)]
    if len(whole) < max(len(drawn) / 2, 1):
        raise ValueError(
            f"only {len(whole)} of {len(drawn)} resamples could be fitted; the runs are too few or "
            "too alike for an interval"
        )
    tail = (1 - level) / 2
    lows, highs = np.quantile(whole, [tail, 1 - tail], axis=0)
    return [
        Estimate(float(value), float(low), float(high))
        for value, low, high in zip(values, lows, highs, strict=True)
    ]
