"""Which batch an update takes, against the list of all batches with some of them struck out."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_dlm.training.skipped_batches import batch_of, skipping, stretches

_RANGES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=6)


def remaining(added: list[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
    """Ranges as the run keeps them, and the first batches that are left."""
    skipped: list[list[int]] = []
    struck = set()
    for first, more in added:
        skipped = skipping(skipped, first, first + more)
        struck |= set(range(first, first + more + 1))
    left = itertools.islice((n for n in itertools.count(1) if n not in struck), 60)
    return skipped, list(left)


@given(_RANGES)
def test_update_n_takes_the_nth_batch_that_is_left(added: list[tuple[int, int]]) -> None:
    skipped, left = remaining(added)
    assert [batch_of(step, skipped) for step in range(1, 61)] == left
    for (_, end), (begin, _) in itertools.pairwise(skipped):
        assert begin > end + 1


@given(_RANGES, st.integers(0, 59))
def test_stretches_are_what_is_left_after_a_start(
    added: list[tuple[int, int]], start_step: int
) -> None:
    skipped, left = remaining(added)
    found = stretches(start_step, 60, skipped)
    taken = [batch for first, count in found for batch in range(first, first + count)]
    assert taken == left[start_step:]
    assert len(found) <= len(skipped) + 1


def test_second_rollback_over_a_first_one() -> None:
    """Back to step 4 after update 6, whose batch is 10, as 5 to 8 were left out before."""
    first, last = batch_of(5, [[5, 8]]), batch_of(6, [[5, 8]])
    assert (first, last) == (9, 10)
    assert skipping([[5, 8]], first, last) == [[5, 10]]
