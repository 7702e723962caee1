"""The best value of a setting: the lowest point of scores over it, and how sure that point is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats

_RESAMPLES = 1000


@dataclass(frozen=True)
class Basin:
    """Scores, lower is better, over the values of a setting."""

    lowest: int
    """Place of the value with the lowest mean; of equal ones the first."""
    is_at_edge: bool
    """Whether that is the first or the last value: a better one may lie outside."""
    bottom: Estimate
    """The value at the bottom of the parabola through the lowest point and its neighbours, with a
    95 % interval over seeds; at an edge the value there."""
    as_good: tuple[int, ...]
    """Places of other values that the seeds do not tell apart from the lowest."""


def find_basin(values: Sequence[float], scores: Sequence[Sequence[float]]) -> Basin:
    """values: the setting, rising; scores: of every value, one of each seed.

    The parabola is over log value where all values are positive. Intervals resample the seeds of
    every value; from a single seed there is nothing to resample, and the interval is the value.
    Raises ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("the best value of a setting needs runs with two values at least")
    places = np.asarray(values, dtype=np.float64)
    is_log = bool(np.all(places > 0))
    scale = np.log(places) if is_log else places
    table = [np.asarray(of_value, dtype=np.float64) for of_value in scores]
    means = np.array([of_value.mean() for of_value in table])
    drawn = _resampled_means(table)
    bottoms = np.concatenate([_bottoms(scale, means[None]), _bottoms(scale, drawn)])
    if is_log:
        bottoms = np.exp(bottoms)
    low, high = np.quantile(bottoms[1:], [0.025, 0.975])
    lowest = int(means.argmin())
    # Not told apart: in 2.5 % of the resamples or more the other is no worse.
    no_worse = np.quantile(drawn - drawn[:, [lowest]], 0.025, axis=0) <= 0
    return Basin(
        lowest,
        is_at_edge=lowest in (0, len(values) - 1),
        bottom=Estimate(float(bottoms[0]), float(low), float(high)),
        as_good=tuple(int(place) for place in np.flatnonzero(no_worse) if place != lowest),
    )


def _resampled_means(table: Sequence[Floats]) -> Floats:
    """Means [resamples, values] over seeds drawn with replacement, of every value for itself."""
    random = np.random.default_rng(0)
    columns = [
        of_value[random.integers(len(of_value), size=(_RESAMPLES, len(of_value)))].mean(axis=1)
        for of_value in table
    ]
    return np.stack(columns, axis=1)


def _bottoms(scale: Floats, means: Floats) -> Floats:
    """Place [n] on the scale of the bottom of every row of means [n, values]."""
    lowest = means.argmin(axis=1)
    rows = np.arange(len(means))
    middle = np.clip(lowest, 1, len(scale) - 2) if len(scale) > 2 else lowest
    if len(scale) < 3:
        return np.asarray(scale[lowest])
    left, right = scale[middle] - scale[middle - 1], scale[middle + 1] - scale[middle]
    here = means[rows, middle]
    rise_left, rise_right = means[rows, middle - 1] - here, means[rows, middle + 1] - here
    # Newton's form of the parabola through three points; curved upwards where the middle is lowest.
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature = (rise_left / left + rise_right / right) / (left + right)
        slope = (rise_right * left / right - rise_left * right / left) / (left + right)
        bottoms = scale[middle] - slope / (2 * curvature)
    is_inside = (lowest == middle) & (curvature > 0)
    return np.asarray(np.where(is_inside, bottoms, scale[lowest]))
