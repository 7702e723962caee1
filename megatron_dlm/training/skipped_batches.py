"""The data order without the batches that made a run go wrong.

Batches are numbered from 1 in the order of the data. Update n takes the n-th batch that is not
skipped. What belongs to a batch (its noise, its length, its place in a curriculum) goes with the
number of the batch; what belongs to an update (learning rate, dropout, reports, saves) with that
of the update.
"""

from __future__ import annotations

from collections.abc import Sequence

Ranges = Sequence[Sequence[int]]
"""[first, last] batches, both skipped; ascending and apart."""


def batch_of(step: int, skipped: Ranges) -> int:
    """The batch that update number `step` takes."""
    batch = step
    for first, last in skipped:
        if first <= batch:
            batch += last - first + 1
    return batch


def skipping(skipped: Ranges, first: int, last: int) -> list[list[int]]:
    """`skipped` with batches first to last added; ranges that touch become one."""
    ranges: list[list[int]] = []
    for begin, end in sorted([*map(tuple, skipped), (first, last)]):
        if ranges and begin <= ranges[-1][1] + 1:
            ranges[-1][1] = max(ranges[-1][1], end)
        else:
            ranges.append([begin, end])
    return ranges


def stretches(start_step: int, num_steps: int, skipped: Ranges) -> list[tuple[int, int]]:
    """(first batch, how many) of the unbroken stretches that updates start_step+1 to num_steps
    take."""
    found: list[tuple[int, int]] = []
    step = start_step
    while step < num_steps:
        first = batch_of(step + 1, skipped)
        following = [begin for begin, _ in skipped if begin > first]
        count = min([num_steps - step, *(begin - first for begin in following)])
        found.append((first, count))
        step += count
    return found
