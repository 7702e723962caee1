"""Crossings of families of curves with known truth: noise, ties, several, none, U-shapes."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.scaling.crossings import Curve, best, compare

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
    assert found.crossing is not None
    assert found.crossing.value == pytest.approx(50)
    assert (found.crossing.low, found.crossing.high) == pytest.approx((50, 50))
    assert found.share == 1
    [passage] = found.passages
    assert (passage.x, passage.y) == pytest.approx((50, 2.5))
    assert passage.is_below_after


def test_without_a_crossing_the_bound_is_the_end() -> None:
    found = compare(family(line(2, 0)), family(line(3, -0.005)))
    assert found.crossing is None
    assert (found.bound, found.share, found.passages) == (100, 0, ())


def test_always_lower_is_no_crossing() -> None:
    assert compare(family(line(3, 0)), family(line(2, 0))).crossing is None


def test_u_shapes_cross_and_come_back() -> None:
    """Both overfit; the second passes below, and above again later."""
    first = 2 + 0.0004 * (X - 20) ** 2
    second = 2.5 + 0.0012 * (X - 50) ** 2 - 0.2
    found = compare(family(first), family(second))
    exact = np.sort(np.roots([0.0008, -0.12 + 0.016, 0.3 + 3.0 - 0.16]))
    inside = [x for x in exact.real if 1 <= x <= 100]
    assert [passage.x for passage in found.passages] == pytest.approx(inside, abs=0.02)
    assert [passage.is_below_after for passage in found.passages] == [True, False]
    assert found.crossing is None, "it is not lower at the end"


def test_curves_that_touch_do_not_cross() -> None:
    gap = np.where(X == 50, 0.0, 1.0)
    assert compare(family(line(2, 0)), family(2 + gap)).passages == ()


def test_intervals_hold_the_truth() -> None:
    held = 0
    for trial in range(60):
        first = family(line(2, 0.01), noise=0.05, seeds=5, start=100 * trial)
        second = family(line(3, -0.01), noise=0.05, seeds=5, start=100 * trial + 50)
        found = compare(first, second, smoothing=0.1, count=200, seed=trial)
        assert found.crossing is not None
        held += found.crossing.low <= 50 <= found.crossing.high
    assert held >= 40, "five seeds give intervals that are too narrow, but not by much"


def test_smoothing_takes_noise_and_leaves_lines() -> None:
    noisy = [Curve(X, line(3, -0.01) + 0.3 * (-1.0) ** np.arange(len(X)))]
    rough = compare(family(line(2, 0.01)), noisy)
    smooth = compare(family(line(2, 0.01)), noisy, smoothing=0.1)
    assert len(rough.passages) > 5
    assert smooth.crossing is not None
    assert smooth.crossing.value == pytest.approx(50, abs=2)


def test_missing_points_are_no_matter() -> None:
    keep = np.random.default_rng(0).random(len(X)) < 0.5
    keep[[0, -1]] = True
    sparse = [Curve(X[keep], line(3, -0.01)[keep])]
    found = compare(family(line(2, 0.01)), sparse)
    assert found.crossing is not None
    assert found.crossing.value == pytest.approx(50)


def test_best_is_the_mean_of_the_lowest() -> None:
    curves = [Curve(X, 2 + np.abs(X - 30)), Curve(X, 4 + np.abs(X - 60))]
    assert best(curves) == pytest.approx(3)


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
