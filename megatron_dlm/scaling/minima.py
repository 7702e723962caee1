"""The lowest point of a parabola in the logarithm of a setting, in each of several groups of runs.

The best size at every budget, the best learning rate at every batch size, the batch size that needs
the fewest tokens for every loss: all are this question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Floats, spread_residuals, wild_factors

_FLAT = 1e-9
_FARTHEST = 50.0
"""In logarithms; a lowest point farther away is that of a straight line."""


@dataclass(frozen=True)
class Point:
    """One run in a group."""

    group: float
    """What the runs of a group have in common: a budget, a batch size, a loss."""
    setting: float
    """What is best at some value: a size, a learning rate."""
    value: float
    """What is lowest there."""
    run: str
    """Points of one run share its errors."""


@dataclass(frozen=True)
class Parabola:
    """value = lowest + curvature * (log setting - log best_size)^2."""

    best_size: float
    lowest: float
    curvature: float
    is_inside: bool
    """Whether the best lies between the smallest and the largest that were tried."""


@dataclass(frozen=True)
class Minima:
    """The minima of those groups that have one."""

    groups: tuple[float, ...]
    """Rising."""
    log_settings: Floats
    """[groups]"""
    values: Floats
    """[groups]"""
    num_points: tuple[int, ...]
    variances: Floats
    """[2, groups]: of log settings and of values, for runs of equal noise and parabolas of equal
    curvature; up to a factor of each row."""
    drawn_log_settings: Floats
    """[resamples, groups]; NaN where the parabola of a resample has no lowest point."""
    drawn_values: Floats
    """[resamples, groups]"""
    left_out: dict[float, str]
    """Groups without a best setting among those tried, and why."""


def fit_parabola(sizes: Sequence[float] | Floats, values: Sequence[float] | Floats) -> Parabola:
    """Least squares of a parabola in log size.

    Raises ValueError for fewer than three sizes, and where it opens downwards: no best size.
    """
    log_size = np.log(np.asarray(sizes, dtype=np.float64))
    if len(np.unique(np.round(log_size, 9))) < 3:
        raise ValueError("a parabola needs three different settings; train more")
    design, center = _design(log_size)
    offset, slope, curvature = np.linalg.pinv(design) @ np.asarray(values, dtype=np.float64)
    is_bent = curvature > _FLAT * max(abs(slope), abs(offset))
    best = -slope / (2 * curvature) if is_bent else np.inf
    if abs(best) > _FARTHEST:
        raise ValueError("the losses have no lowest point")
    return Parabola(
        best_size=float(np.exp(center + best)),
        lowest=float(offset - curvature * best**2),
        curvature=float(curvature),
        is_inside=bool(log_size.min() <= center + best <= log_size.max()),
    )


def is_judged(settings: Sequence[float]) -> bool:
    """Whether a parabola is left without any one of the runs, so that each says how sure it is.

    True for four settings, and for three of two runs each. A run without which there is no parabola
    has no residual: the fit goes through it, however wrong it is.
    """
    counts = Counter(np.round(np.log(settings), 9).tolist())
    return len(counts) - (1 in counts.values()) >= 3


def find_minima(points: Sequence[Point], *, count: int = 1000, seed: int = 0) -> Minima:
    """The minimum of every group, and those of `count` resamples by a wild bootstrap over runs.

    A best setting outside of those tried is none: a parabola says nothing there. Nor has a group a
    minimum that nothing can judge, as that of three runs: it would count as free of errors.
    """
    of_group: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.group):
        of_group.setdefault(point.group, []).append(point)
    found: dict[float, Parabola] = {}
    left_out: dict[float, str] = {}
    for group, members in of_group.items():
        try:
            found[group] = _inside(members)
        except ValueError as error:
            left_out[group] = str(error)
    drawn = np.full((2, count, len(found)), np.nan)
    if found and count:
        drawn = _drawn([of_group[group] for group in found], count, seed)
    return Minima(
        groups=tuple(found),
        log_settings=np.log([parabola.best_size for parabola in found.values()]),
        values=np.array([parabola.lowest for parabola in found.values()]),
        num_points=tuple(len(of_group[group]) for group in found),
        variances=_variances([of_group[group] for group in found], tuple(found.values())),
        drawn_log_settings=drawn[0],
        drawn_values=drawn[1],
        left_out=left_out,
    )


def reasons(left_out: Mapping[str, str]) -> str:
    """Why groups were left out, in one line, each reason once; empty where none was."""
    groups: dict[str, list[str]] = {}
    for group, why in left_out.items():
        groups.setdefault(why, []).append(group)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in groups.items())


def _inside(members: Sequence[Point]) -> Parabola:
    settings = [point.setting for point in members]
    parabola = fit_parabola(settings, [point.value for point in members])
    if not is_judged(settings):
        raise ValueError(
            f"{len(settings)} runs at {len(set(settings))} settings leave nothing to judge the "
            "parabola by; train four settings, or each of three twice"
        )
    if not parabola.is_inside:
        raise ValueError(
            f"the best, {parabola.best_size:.3g}, lies outside of what was tried, "
            f"{min(settings):.3g} to {max(settings):.3g}"
        )
    return parabola


def _drawn(groups: Sequence[Sequence[Point]], count: int, seed: int) -> Floats:
    """[2, count, groups]: log settings and values of the minima of every resample."""
    runs = [point.run for members in groups for point in members]
    # Points of one run at several groups are no new evidence: the spare ones count by the run.
    spare = len(set(runs)) * (1 - 3 * len(groups) / len(runs))
    factors = wild_factors(runs, spare, count, seed)
    drawn = np.full((2, count, len(groups)), np.nan)
    start = 0
    for place, members in enumerate(groups):
        values = np.array([point.value for point in members])
        log_size = np.log([point.setting for point in members])
        design, center = _design(log_size)
        solve = np.linalg.pinv(design)
        fitted = design @ (solve @ values)
        spread = spread_residuals(design, values - fitted)
        of_group = factors[:, start : start + len(members)]
        start += len(members)
        offset, slope, curvature = ((fitted + of_group * spread) @ solve.T).T
        best = -slope / (2 * np.where(curvature > 0, curvature, np.nan))
        # Beyond one more range of settings on either side it is a straight line, not a minimum.
        best = np.where(np.abs(best) <= 1.5 * np.ptp(log_size), best, np.nan)
        drawn[0, :, place], drawn[1, :, place] = center + best, offset - curvature * best**2
    return drawn


def _variances(groups: Sequence[Sequence[Point]], parabolas: Sequence[Parabola]) -> Floats:
    """See `Minima.variances`: how well the settings of a group surround its minimum."""
    found = np.empty((2, len(groups)))
    for place, (members, parabola) in enumerate(zip(groups, parabolas, strict=True)):
        design, center = _design(np.log([point.setting for point in members]))
        solve = np.linalg.pinv(design)
        best = np.log(parabola.best_size) - center
        # Of -b / 2c by b and c, without the factor 1 / 2c; and of the value at the minimum.
        for row, slopes in enumerate(((0.0, 1.0, 2 * best), (1.0, best, best**2))):
            found[row, place] = ((np.array(slopes) @ solve) ** 2).sum()
    return found


def _design(log_size: Floats) -> tuple[Floats, float]:
    """[n, 3]: 1, x, x^2 of centred logarithms (others would lose digits), and the center."""
    center = float(log_size.mean())
    x = log_size - center
    return np.stack([np.ones_like(x), x, x**2], axis=1), center
