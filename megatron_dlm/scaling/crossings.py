"""Where the curves of one family of runs pass those of another for good, and how sure that is.

A family is the same setting with several seeds. x is whatever the question is about: epochs, tokens
or FLOPs; y is any metric. Of two values the lower one is the better, unless it is said otherwise.
"""

from __future__ import annotations

import math
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
    is_better_after: bool
    """Whether the second family is the better one from here on."""


@dataclass(frozen=True)
class Best:
    """Means over the seeds of a family."""

    value: float
    """Of the best y of every run: what early stopping would keep."""
    x: float
    """Of the x of the best y."""


@dataclass(frozen=True)
class Comparison:
    """The second family against the first, over the x that all of their curves cover."""

    passages: tuple[Passage, ...]
    """Every crossing of the means, in order."""
    crossing: Estimate
    """Where the second is better for good, with an interval over all resamples of the seeds: inf
    where it is not at the end and can only cross later, -inf where it is all along and crossed
    before, if ever."""
    start: float
    """Of the common range."""
    end: float
    """Of the common range."""
    share: float
    """Share of the resamples that cross inside of the range."""
    best_first: Best
    """Up to the end of the range, which all runs have reached."""
    best_second: Best
    """As of the first."""
    difference: Estimate
    """Best of the second less best of the first, with an interval by resampling seeds."""


def compare(
    first: Sequence[Curve],
    second: Sequence[Curve],
    *,
    higher_is_better: bool = False,
    smoothing: float = 0.0,
    count: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Means over seeds, their crossings, and intervals by resampling the seeds of both families.

    smoothing: standard deviation, in natural logarithms of x, of a Gaussian average over the points
    of a curve; 0.1 averages over about 10 % of x. count: resamples, 1 or more. Raises ValueError
    where the families share no x.
    """
    sign = -1 if higher_is_better else 1
    x, table = on_common_x([*first, *second], smoothing)
    tables = [table[: len(first)], table[len(first) :]]
    gap = sign * (tables[1].mean(axis=0) - tables[0].mean(axis=0))
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        means = [
            values[random.integers(len(values), size=len(values))].mean(axis=0) for values in tables
        ]
        drawn.append(_for_good(x, sign * (means[1] - means[0])))
    bests = [[_best_of(curve, x[-1], sign) for curve in family] for family in (first, second)]
    return Comparison(
        tuple(_passages(x, gap, tables[1].mean(axis=0))),
        Estimate(_for_good(x, gap), *ends_by_rank(drawn)),
        start=float(x[0]),
        end=float(x[-1]),
        share=float(np.isfinite(drawn).mean()),
        best_first=_mean_best(bests[0]),
        best_second=_mean_best(bests[1]),
        difference=_difference(*bests, count=count, seed=seed),
    )


def on_common_x(curves: Sequence[Curve], smoothing: float = 0.0) -> tuple[Floats, Floats]:
    """x [n] that all curves cover, and y [curves, n] there by straight lines between points.

    smoothing: as of `compare`. Raises ValueError where the curves share no x.
    """
    start, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if start >= end:
        raise ValueError(
            f"the curves have no x in common: one ends at {end:g}, one begins at {start:g}; train "
            "or report all further"
        )
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = np.asarray(x[(x >= start) & (x <= end)], dtype=np.float64)
    return x, np.stack([np.interp(x, curve.x, curve.smoothed(smoothing).y) for curve in curves])


def ends_by_rank(drawn: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of what was drawn, which may be infinite.

    Ends are values that were drawn: half way to infinity is no number.
    """
    rank = int(0.025 * len(drawn))
    values = sorted(drawn)
    return float(values[rank]), float(values[-1 - rank])


def _best_of(curve: Curve, end: float, sign: int) -> tuple[float, float]:
    """The best y up to the end, and its x."""
    place = int((sign * curve.y[curve.x <= end]).argmin())
    return float(curve.y[place]), float(curve.x[place])


def _mean_best(bests: Sequence[tuple[float, float]]) -> Best:
    value, x = np.mean(bests, axis=0)
    return Best(float(value), float(x))


def _difference(
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]],
    *,
    count: int,
    seed: int,
) -> Estimate:
    values = [np.array([value for value, _ in family]) for family in (first, second)]
    random = np.random.default_rng(seed)
    means = [
        family[random.integers(len(family), size=(count, len(family)))].mean(axis=1)
        for family in values
    ]
    difference = float(values[1].mean() - values[0].mean())
    return intervals([difference], (means[1] - means[0])[:, None])[0]


def _passages(x: Floats, gap: Floats, values: Floats) -> list[Passage]:
    """Changes of sign; points where the curves touch and part again are none."""
    signs = np.sign(gap)
    places = np.flatnonzero(signs)
    found = []
    for left, right in pairwise(places.tolist()):
        if signs[left] != signs[right]:
            # Between the two the gap may be 0: then it ends where `right` begins.
            at = _zero(x, gap, right - 1)
            found.append(Passage(at, float(np.interp(at, x, values)), bool(signs[right] < 0)))
    return found


def _for_good(x: Floats, gap: Floats) -> float:
    """Where `gap` falls below 0 and stays there; inf: it does not, -inf: it is from the start."""
    not_below = np.flatnonzero(gap >= 0)
    if len(not_below) == 0:
        return -math.inf
    left = int(not_below[-1])
    return math.inf if left == len(x) - 1 else _zero(x, gap, left)


def _zero(x: Floats, gap: Floats, left: int) -> float:
    """Where the straight line from here to the next point is 0."""
    share = gap[left] / (gap[left] - gap[left + 1])
    return float(x[left] + share * (x[left + 1] - x[left]))
