"""Where the curves of one family of runs pass below those of another, and how sure that is.

A family is the same setting with several seeds. x is whatever the question is about: epochs, tokens
or FLOPs; y is any metric where lower is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, intervals


@dataclass(frozen=True)
class Curve:
    """One run: x rising, y at every x."""

    x: Floats
    y: Floats

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) < 2:
            raise ValueError(f"a curve needs two points or more, this one has {len(self.x)}")
        if not np.all(np.diff(self.x) > 0):
            raise ValueError("the x of a curve must rise; leave repeated points out")

    def smoothed(self, width: float) -> Curve:
        """A Gaussian average over the points; width: standard deviation in natural logarithms of x.

        0.1 averages over about 10 % of x; 0 changes nothing. A point at x = 0 stays as it is.
        """
        if width == 0:
            return self
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = (np.log(self.x)[:, None] - np.log(self.x)[None, :]) / width
        # log 0 - log 0: a point is at no distance from itself.
        np.fill_diagonal(distance, 0.0)
        weights = np.exp(-(distance**2) / 2)
        return Curve(self.x, weights @ self.y / weights.sum(axis=1))


@dataclass(frozen=True)
class Passage:
    """One crossing of the two mean curves."""

    x: float
    y: float
    is_below_after: bool
    """Whether the second family is the lower one from here on."""


@dataclass(frozen=True)
class Comparison:
    """The second family against the first, over the x that all of their curves cover."""

    passages: tuple[Passage, ...]
    """Every crossing of the means, in order."""
    crossing: Estimate | None
    """Where the second is lower for good; None if it is not at the end, or was from the start. The
    interval is over seeds, among those resamples that cross: see `share`."""
    start: float
    """The start of the common range: where the second is lower all along, it crossed before."""
    bound: float
    """The end of the common range: where the second is not lower there, it can only cross later."""
    is_below_at_end: bool
    """Whether the second family is the lower one at the end of the range."""
    share: float
    """Share of the resamples in which the second family is lower at the end and was not before."""
    smoothing: float
    """Width of the smoothing, as a factor in x; 0 is none."""


def compare(
    first: Sequence[Curve],
    second: Sequence[Curve],
    *,
    smoothing: float = 0.0,
    count: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Means over seeds, their crossings, and intervals by resampling the seeds of both families.

    smoothing: standard deviation, in natural logarithms of x, of a Gaussian average over the points
    of a curve; 0.1 averages over about 10 % of x. Raises ValueError where the families share no x.
    """
    grid = _common_grid([*first, *second])
    tables = [
        np.stack([_on(curve, grid, smoothing) for curve in family]) for family in (first, second)
    ]
    gap = tables[1].mean(axis=0) - tables[0].mean(axis=0)
    passages = _passages(grid, gap, tables[1].mean(axis=0))
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        means = [
            table[random.integers(len(table), size=len(table))].mean(axis=0) for table in tables
        ]
        found = for_good(grid, means[1] - means[0])
        if found is not None:
            drawn.append(found)
    crossing = None
    place = for_good(grid, gap)
    if place is not None:
        low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (place, place)
        crossing = Estimate(place, float(low), float(high))
    return Comparison(
        tuple(passages),
        crossing,
        start=float(grid[0]),
        bound=float(grid[-1]),
        is_below_at_end=bool(gap[-1] < 0),
        share=len(drawn) / count if count else float(crossing is not None),
        smoothing=smoothing,
    )


def best(family: Sequence[Curve]) -> float:
    """Mean over seeds of the lowest y of every run: what early stopping would keep."""
    return float(np.mean([curve.y.min() for curve in family]))


def best_x(family: Sequence[Curve]) -> float:
    """Mean over seeds of the x of the lowest y."""
    return float(np.mean([curve.x[curve.y.argmin()] for curve in family]))


def best_difference(
    first: Sequence[Curve], second: Sequence[Curve], *, count: int = 1000, seed: int = 0
) -> Estimate:
    """The second family's best less the first's, with an interval by resampling seeds."""
    lowest = [np.array([curve.y.min() for curve in family]) for family in (first, second)]
    random = np.random.default_rng(seed)
    means = [
        values[random.integers(len(values), size=(count, len(values)))].mean(axis=1)
        for values in lowest
    ]
    value = lowest[1].mean() - lowest[0].mean()
    return intervals([float(value)], (means[1] - means[0])[:, None])[0]


def _common_grid(curves: Sequence[Curve]) -> Floats:
    start, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if start >= end:
        raise ValueError("the curves have no x in common; train or report both further")
    grid = np.unique(np.concatenate([curve.x for curve in curves]))
    return np.asarray(grid[(grid >= start) & (grid <= end)], dtype=np.float64)


def _on(curve: Curve, grid: Floats, smoothing: float) -> Floats:
    """y at the grid, by straight lines in x, of the curve as it is or smoothed."""
    return np.asarray(np.interp(grid, curve.x, curve.smoothed(smoothing).y), dtype=np.float64)


def _passages(grid: Floats, gap: Floats, values: Floats) -> list[Passage]:
    """Changes of sign; points where the curves touch and part again are none."""
    signs = np.sign(gap)
    places = np.flatnonzero(signs)
    found = []
    for left, right in pairwise(places.tolist()):
        if signs[left] != signs[right]:
            x = _zero(grid, gap, left, right)
            found.append(Passage(x, float(np.interp(x, grid, values)), bool(signs[right] < 0)))
    return found


def for_good(grid: Floats, gap: Floats) -> float | None:
    """Where `gap` falls below 0 and stays there, by straight lines; None if it does not."""
    not_below = np.flatnonzero(gap >= 0)
    if len(not_below) == 0 or not_below[-1] == len(grid) - 1:
        return None
    left = int(not_below[-1])
    return _zero(grid, gap, left, left + 1)


def _zero(grid: Floats, gap: Floats, left: int, right: int) -> float:
    share = gap[left] / (gap[left] - gap[right])
    return float(grid[left] + share * (grid[right] - grid[left]))
