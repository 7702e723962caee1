"""The best value of a setting: parabolas with known bottoms, edges, ties, seeds."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.scaling.basins import find_basin

RATES = [1e-3 * 2.0**place for place in range(7)]


def parabola(best: float, at: float) -> float:
    return 3.0 + 0.1 * np.log(at / best) ** 2


def test_a_parabola_between_the_values_is_found_exactly() -> None:
    basin = find_basin(RATES, [[parabola(0.0101, rate)] for rate in RATES])
    assert RATES[basin.lowest] == 8e-3
    assert not basin.is_at_edge
    assert basin.bottom.value == pytest.approx(0.0101, rel=1e-9)
    assert (basin.bottom.low, basin.bottom.high) == pytest.approx((0.0101, 0.0101))
    assert basin.as_good == ()


def test_uneven_values_do_not_matter() -> None:
    rates = [1e-3, 3e-3, 4e-3, 2e-2]
    basin = find_basin(rates, [[parabola(0.0035, rate)] for rate in rates])
    assert basin.bottom.value == pytest.approx(0.0035, rel=1e-9)


def test_values_with_zero_are_not_taken_in_logarithms() -> None:
    values = [0.0, 0.1, 0.2, 0.4, 0.8]
    basin = find_basin(values, [[2 + (value - 0.17) ** 2] for value in values])
    assert basin.bottom.value == pytest.approx(0.17)


@pytest.mark.parametrize(("best", "lowest"), [(1e-4, 0), (1.0, 6)])
def test_an_edge_is_told_and_not_left(best: float, lowest: int) -> None:
    basin = find_basin(RATES, [[parabola(best, rate)] for rate in RATES])
    assert (basin.lowest, basin.is_at_edge) == (lowest, True)
    assert basin.bottom.value == pytest.approx(RATES[lowest])


def test_equal_scores_are_as_good() -> None:
    basin = find_basin([1, 2, 3, 4], [[3.0], [2.0], [2.0], [3.0]])
    assert (basin.lowest, basin.as_good) == (1, (2,))
    assert 2 < basin.bottom.value < 3


def test_a_flat_basin_has_no_other_bottom() -> None:
    basin = find_basin([1, 2, 3], [[2.0], [2.0], [2.0]])
    assert (basin.lowest, basin.is_at_edge, basin.as_good) == (0, True, (1, 2))
    assert basin.bottom.value == 1


def test_two_values_have_edges_only() -> None:
    assert find_basin([1, 2], [[3.0], [2.0]]).is_at_edge
    with pytest.raises(ValueError, match="two values"):
        find_basin([1], [[3.0]])


def test_intervals_hold_the_truth_and_seeds_decide_what_is_as_good() -> None:
    held, confused = 0, 0
    for trial in range(40):
        random = np.random.default_rng(trial)
        scores = [
            [parabola(0.0101, rate) + random.normal(0, 0.01) for _ in range(5)] for rate in RATES
        ]
        basin = find_basin(RATES, scores)
        held += basin.bottom.low <= 0.0101 <= basin.bottom.high
        # At 4e-3 and 16e-3 the truth is 0.08 and 0.02 worse: 0.02 is three standard errors.
        confused += any(RATES[place] != 16e-3 for place in basin.as_good if place != 3)
    assert held >= 32
    assert confused == 0


def test_seeds_of_different_number_are_allowed() -> None:
    basin = find_basin([1, 2, 4], [[3.0, 3.1], [2.0], [2.5, 2.6, 2.7]])
    assert basin.lowest == 1
