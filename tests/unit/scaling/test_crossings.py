"""Crossings of families of curves with known truth: noise, ties, several, none, U-shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.crossings import Curve, compare, ends_by_rank

X = np.linspace(1, 100, 100)


def family(values: np.ndarray, noise: float = 0.0, seeds: int = 3, start: int = 0) -> list[Curve]:
    curves = []
    for seed in range(start, start + seeds):
        random = np.random.default_rng(seed)
        curves.append(Curve(X, values + random.normal(0, noise, len(X)) + random.normal(0, noise)))
    return curves


def line(height: float, slope: float) -> np.ndarray:
    return height + slope * X


def test_straight_lines_cross_where_they_must() -> None:
    found = compare(family(line(2, 0.01)), family(line(3, -0.01)))
    assert found.crossing.value == pytest.approx(50)
    assert (found.crossing.low, found.crossing.high) == pytest.approx((50, 50))
    assert found.share == 1
    [passage] = found.passages
    assert (passage.x, passage.y) == pytest.approx((50, 2.5))
    assert passage.is_better_after


def test_without_a_crossing_the_bound_is_the_end() -> None:
    found = compare(family(line(2, 0)), family(line(3, -0.005)))
    assert found.crossing == Estimate(math.inf, math.inf, math.inf)
    assert (found.end, found.share, found.passages) == (100, 0, ())


def test_always_lower_is_no_crossing() -> None:
    found = compare(family(line(3, 0)), family(line(2, 0)))
    assert found.crossing == Estimate(-math.inf, -math.inf, -math.inf)
    assert (found.start, found.share) == (1, 0)


def test_u_shapes_cross_and_come_back() -> None:
    """Both overfit; the second passes below, and above again later."""
    first = 2 + 0.0004 * (X - 20) ** 2
    second = 2.5 + 0.0012 * (X - 50) ** 2 - 0.2
    found = compare(family(first), family(second))
    exact = np.sort(np.roots([0.0008, -0.12 + 0.016, 0.3 + 3.0 - 0.16]))
    inside = [x for x in exact.real if 1 <= x <= 100]
    assert [passage.x for passage in found.passages] == pytest.approx(inside, abs=0.02)
    assert [passage.is_better_after for passage in found.passages] == [True, False]
    assert found.crossing.value == math.inf, "it is not lower at the end"


def test_curves_that_touch_do_not_cross() -> None:
    gap = np.where(X == 50, 0.0, 1.0)
    assert compare(family(line(2, 0)), family(2 + gap)).passages == ()


def test_curves_that_touch_before_they_cross_part_where_they_touch() -> None:
    first = [Curve(np.array([0.0, 1.0, 2.0]), np.zeros(3))]
    found = compare(first, [Curve(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, -3.0]))])
    assert found.crossing.value == 1
    assert [passage.x for passage in found.passages] == [1]


def test_a_resample_that_does_not_cross_is_beyond_the_end() -> None:
    """It crosses unless the late seed is drawn twice or thrice of three times: in 20 of 27."""
    first = [Curve(X, line(2, 0))] * 3
    second = [Curve(X, line(height, -0.01)) for height in (2.3, 2.3, 3.7)]
    found = compare(first, second, count=4000)
    assert found.share == pytest.approx(20 / 27, abs=0.03)
    assert found.crossing.value == pytest.approx(230 / 3)
    assert (found.crossing.low, found.crossing.high) == (pytest.approx(30), math.inf)


def test_a_resample_that_is_lower_from_the_start_is_before_it() -> None:
    first = [Curve(X, line(2, 0))] * 3
    second = [Curve(X, line(height, -0.01)) for height in (2.3, 2.3, 1.6)]
    found = compare(first, second)
    assert found.crossing.value == pytest.approx(20 / 3)
    assert (found.crossing.low, found.crossing.high) == (-math.inf, pytest.approx(30))
    assert found.share == pytest.approx(20 / 27, abs=0.05)


def test_ends_are_values_that_were_drawn() -> None:
    drawn = [*range(39), math.inf]
    assert ends_by_rank(drawn) == (1, 38)
    assert ends_by_rank([*drawn, math.inf, 7]) == (1, math.inf)
    assert ends_by_rank([5.0]) == (5, 5)


def test_accuracies_pass_above() -> None:
    """0.3 + 0.001 x and 0.25 + 0.006 x meet at 10; as losses they never cross for good."""
    first, second = family(line(0.3, 0.001)), family(line(0.25, 0.006))
    found = compare(first, second, higher_is_better=True)
    assert found.crossing.value == pytest.approx(10)
    assert [passage.is_better_after for passage in found.passages] == [True]
    assert found.passages[0].y == pytest.approx(0.31)
    assert (found.best_second.value, found.best_second.x) == pytest.approx((0.85, 100))
    assert found.difference.value == pytest.approx(0.45)
    assert compare(first, second).crossing.value == math.inf


def test_what_is_best_is_taken_where_all_runs_have_been() -> None:
    """A run of 30 is not compared with what the other found at 100; the start counts for both."""
    falling = line(3, -0.01)
    found = compare([Curve(X, falling)], [Curve(X[:30], falling[:30] + 0.1)])
    assert (found.start, found.end) == (1, 30)
    assert (found.best_first.x, found.best_second.x) == (30, 30)
    assert found.difference.value == pytest.approx(0.1)
    rising = Curve(X, line(2, 0.01))
    found = compare([rising], [Curve(X[9:], falling[9:])])
    assert (found.start, found.best_first.x) == (10, 1)


def test_intervals_hold_the_truth() -> None:
    held = 0
    for trial in range(60):
        first = family(line(2, 0.01), noise=0.05, seeds=5, start=100 * trial)
        second = family(line(3, -0.01), noise=0.05, seeds=5, start=100 * trial + 50)
        found = compare(first, second, smoothing=0.1, count=200, seed=trial)
        held += found.crossing.low <= 50 <= found.crossing.high
    assert held >= 40, "five seeds give intervals that are too narrow, but not by much"


def test_smoothing_takes_noise_and_leaves_lines() -> None:
    noisy = [Curve(X, line(3, -0.01) + 0.3 * (-1.0) ** np.arange(len(X)))]
    rough = compare(family(line(2, 0.01)), noisy)
    smooth = compare(family(line(2, 0.01)), noisy, smoothing=0.1)
    assert len(rough.passages) > 5
    assert smooth.crossing.value == pytest.approx(50, abs=2)


def test_missing_points_are_no_matter() -> None:
    keep = np.random.default_rng(0).random(len(X)) < 0.5
    keep[[0, -1]] = True
    sparse = [Curve(X[keep], line(3, -0.01)[keep])]
    found = compare(family(line(2, 0.01)), sparse)
    assert found.crossing.value == pytest.approx(50)


def test_best_is_the_mean_of_the_lowest() -> None:
    curves = [Curve(X, 2 + np.abs(X - 30)), Curve(X, 4 + np.abs(X - 60))]
    found = compare(curves, curves)
    assert (found.best_first.value, found.best_first.x) == pytest.approx((3, 45))
    assert found.difference.value == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0], [2.0], "two points or more"),
        ([1.0, 1.0], [2.0, 3.0], "must rise"),
    ],
)
def test_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(np.array(x), np.array(y))


def test_no_common_range() -> None:
    with pytest.raises(ValueError, match="no x in common"):
        compare([Curve(X, X)], [Curve(X + 1000, X)])
