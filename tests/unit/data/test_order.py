"""The permutation is a bijection, uniform over keys, and the same for ints and arrays."""

from __future__ import annotations

from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_dlm.data.order import derive_key, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 64, 97, 255, 256, 257, 1000, 1009, 4096, 65537]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1])
def test_every_place_is_taken_once(size: int, key: int) -> None:
    places = permute(np.arange(size), size=size, key=key)
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(size))


@given(size=st.integers(1, 1 << 62), key=st.integers(0, (1 << 64) - 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_int_and_an_array_give_the_same(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    scalars = [permute(index, size=size, key=key) for index in indices]
    assert all(type(place) is int and 0 <= place < size for place in scalars)
    array = np.array(indices).reshape(1, -1)
    assert permute(array, size=size, key=key).tolist() == [scalars]


def test_known_values_never_change() -> None:
    """A new order would silently change what every resumed run reads."""
    assert permute(np.arange(10), size=10, key=7).tolist() == KNOWN_ORDER
    assert permute(np.arange(5), size=5000, key=7).tolist() == KNOWN_START
    assert derive_key(1234, 1, 2) == KNOWN_KEY


KNOWN_ORDER = [4, 0, 9, 5, 8, 3, 7, 6, 1, 2]
KNOWN_START = [1536, 2791, 440, 2657, 1114]
KNOWN_KEY = 9899549335157577767


@pytest.mark.parametrize("size", [2, 3, 10, 37])
def test_places_are_uniform_over_keys(size: int) -> None:
    num_keys = 2000
    counts = np.zeros((size, size))
    for number in range(num_keys):
        places = permute(np.arange(size), size=size, key=derive_key(5, number))
        counts[np.arange(size), places] += 1
    # Rows and columns sum to num_keys, which leaves (size - 1)^2 degrees of freedom.
    expected = num_keys / size
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert 1e-4 < stats.chi2.sf(statistic, (size - 1) ** 2) < 1 - 1e-4


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_are_equally_likely(size: int) -> None:
    num_keys = 6000
    counts: dict[tuple[int, ...], int] = {}
    for number in range(num_keys):
        order = tuple(permute(np.arange(size), size=size, key=derive_key(9, number)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == factorial(size)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_neighbours_are_scattered() -> None:
    """Distances between neighbours look like those of a random shuffle: mean size / 3."""
    size = 100_003
    places = permute(np.arange(size), size=size, key=3)
    distances = np.abs(np.diff(places))
    assert abs(distances.mean() / (size / 3) - 1) < 0.01
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.015


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = {derive_key(seed, a, b) for seed in (-1, 0, 1) for a in range(5) for b in range(5)}
    assert len(keys) == 75
    assert derive_key(0, 1) != derive_key(1, 0)
