"""Blends give every dataset its share at every prefix, with places counted without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.blend import Blend
from megatron_dlm.data.budget import split_budget

WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.3, 0.7],
    [1, 1000],
    [0.2, 0.3, 0.5],
    [1, 1, 1, 1],
    [1, 2, 4, 8],
    [100, 1, 1, 1],
    [5, 50, 500, 1],
]


def prefix_errors(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """[samples, datasets]: count minus exact share, with places checked on the way."""
    blend = Blend.of(weights)
    counts = np.zeros(len(weights), dtype=np.int64)
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    errors = np.empty((num_samples, len(weights)))
    for index in range(num_samples):
        dataset, pick = blend.locate(index)
        assert pick == counts[dataset]
        counts[dataset] += 1
        errors[index] = counts - (index + 1) * shares
    assert blend.counts(num_samples) == dict(enumerate(counts.tolist()))
    assert np.abs(errors).max() <= blend.bound + 1e-9
    return errors


@pytest.mark.parametrize("weights", WEIGHTS)
def test_counts_are_within_one_of_the_share_at_every_prefix(weights: list[float]) -> None:
    assert np.abs(prefix_errors(weights, 1500)).max() <= 1


@given(st.lists(st.integers(1, 10**6), min_size=5, max_size=8))
@settings(max_examples=40, deadline=None)
def test_more_datasets_stay_near_their_share(weights: list[int]) -> None:
    assert np.abs(prefix_errors(weights, 400)).max() <= 1.15


def test_many_datasets() -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 100, 60).tolist()
    assert np.abs(prefix_errors(weights, 2000)).max() <= 2


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    multiple=st.integers(1, 8),
    step=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_a_batch_that_holds_whole_shares_realises_them_in_every_step(
    weights: list[int], multiple: int, step: int
) -> None:
    blend, batch = Blend.of(weights), multiple * sum(weights)
    assert step_counts(blend, batch, step) == [multiple * weight for weight in weights]


@given(
    first=st.floats(0.001, 0.999).map(lambda share: round(share, 3)),
    batch=st.integers(1, 512),
    step=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_two_datasets_are_exact_in_every_step_but_for_rounding(
    first: float, batch: int, step: int
) -> None:
    counts = step_counts(Blend.of([first, round(1 - first, 3)]), batch, step)
    share = batch * Fraction(str(first))
    assert counts[0] in (floor(share), ceil(share))
    assert sum(counts) == batch


@given(
    weights=st.lists(st.integers(1, 1000), min_size=3, max_size=8),
    batch=st.integers(1, 512),
    step=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_several_datasets_are_within_two_samples_in_every_step(
    weights: list[int], batch: int, step: int
) -> None:
    for count, weight in zip(step_counts(Blend.of(weights), batch, step), weights, strict=True):
        assert abs(count - batch * weight / sum(weights)) < 2.3


def step_counts(blend: Blend, batch: int, step: int) -> list[int]:
    """Samples of each dataset in one step."""
    before, after = blend.counts(step * batch), blend.counts((step + 1) * batch)
    return [after[place] - before[place] for place in sorted(after)]


def test_exact_after_the_sum_of_the_weights() -> None:
    weights = [7, 1, 12, 30]
    blend = Blend.of(weights)
    for periods in (1, 2, 10**9):
        expected = {place: weight * periods for place, weight in enumerate(weights)}
        assert blend.counts(50 * periods) == expected


def test_far_samples_need_no_replay() -> None:
    blend = Blend.of([0.1, 0.2, 0.7])
    index = 10**15
    dataset, pick = blend.locate(index)
    before, after = blend.counts(index), blend.counts(index + 1)
    assert before[dataset] == pick
    assert after == {**before, dataset: pick + 1}


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=5),
    st.integers(0, 10**12),
    st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_budget_parts_sum_and_never_shrink(
    weights: list[float], budget: int, more_tokens: int
) -> None:
    parts, larger = split_budget(budget, weights), split_budget(budget + more_tokens, weights)
    assert sum(parts) == budget
    assert all(small <= large for small, large in zip(parts, larger, strict=True))
    shares = [budget * weight / sum(weights) for weight in weights]
    assert all(abs(part - share) < 1.2 for part, share in zip(parts, shares, strict=True))
