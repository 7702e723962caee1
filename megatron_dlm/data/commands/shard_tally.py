"""Count what a shard holds: lengths of documents from its index, ids from its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_dlm.data.storage.document_blocks import DocumentBlock, read_blocks, read_starts
from megatron_dlm.data.storage.shards import Shard

_BLOCK_TOKENS = 1 << 20
# Ids are counted one by one below this where no vocabulary is known.
_MOST_IDS = 1 << 20


@dataclass(frozen=True)
class TallyTask:
    """What to count in one shard."""

    prefix: str
    vocab_size: int | None
    eod_id: int | None
    max_tokens: int | None
    """Count ids in about this many tokens; None: in all."""


@dataclass
class Tally:
    """What was counted; sums of shards are sums of tallies."""

    dtypes: Counter[str] = field(default_factory=Counter)
    """How ids are stored -> shards."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens in a document -> documents; all documents."""
    counted_tokens: int = 0
    """Tokens that the numbers below are about, from the beginning of each shard."""
    counted_documents: int = 0
    id_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 [ids]: how often each id inside of the vocabulary occurs."""
    smallest_id: int | None = None
    largest_id: int | None = None
    num_outside: int = 0
    """Tokens outside of the vocabulary (or below 0)."""
    first_outside: str | None = None
    """Where the first of them is."""
    num_unended: int = 0
    """Documents that do not end in the end-of-document token."""

    def add(self, other: Tally) -> None:
        """Take another shard in; shards come in the order of the dataset."""
        self.dtypes.update(other.dtypes)
        self.lengths.update(other.lengths)
        self.counted_tokens += other.counted_tokens
        self.counted_documents += other.counted_documents
        size = max(len(self.id_counts), len(other.id_counts))
        summed = np.zeros(size, dtype=np.int64)
        for counts in (self.id_counts, other.id_counts):
            summed[: len(counts)] += counts
        self.id_counts = summed
        self.smallest_id = _reduce(min, self.smallest_id, other.smallest_id)
        self.largest_id = _reduce(max, self.largest_id, other.largest_id)
        self.num_outside += other.num_outside
        self.first_outside = self.first_outside or other.first_outside
        self.num_unended += other.num_unended


def tally_shard(task: TallyTask, advance: Callable[[int], None]) -> Tally:
    """Count one shard; `advance` is told of the bytes of the .bin read."""
    shard, tally = Shard(task.prefix), Tally()
    tally.dtypes[shard.dtype.name] += 1
    for _, starts in read_starts(shard):
        lengths, counts = np.unique(np.diff(starts), return_counts=True)
        tally.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    most = shard.num_tokens if task.max_tokens is None else task.max_tokens
    for block in read_blocks(shard, block_tokens=max(1, min(most, _BLOCK_TOKENS))):
        if tally.counted_tokens >= most and tally.counted_tokens:
            break
        _count_ids(block, task, tally)
        advance(block.tokens.nbytes)
    return tally


def _count_ids(block: DocumentBlock, task: TallyTask, tally: Tally) -> None:
    tokens = block.tokens
    tally.counted_tokens += len(tokens)
    tally.counted_documents += block.num_documents
    starts, ends = block.bounds[:-1], block.bounds[1:]
    if task.eod_id is not None:
        full = np.flatnonzero(ends > starts)
        num_ended = int((tokens[ends[full] - 1] == task.eod_id).sum())
        tally.num_unended += block.num_documents - num_ended
    if not len(tokens):
        return
    smallest, largest = int(tokens.min()), int(tokens.max())
    limit = _MOST_IDS if task.vocab_size is None else task.vocab_size
    inside = tokens
    if smallest < 0 or largest >= limit:
        outside = (tokens < 0) | (tokens >= limit)
        inside = tokens[~outside]
        tally.num_outside += int(outside.sum())
        first = int(np.argmax(outside))
        place = bisect_right(block.bounds, first) - 1
        tally.first_outside = tally.first_outside or (
            f"id {tokens[first]} at token {first - block.bounds[place]} of document "
            f"{block.first + place} of {task.prefix}"
        )
    counts = np.bincount(inside, minlength=len(tally.id_counts))
    counts[: len(tally.id_counts)] += tally.id_counts
    tally.id_counts = counts
    tally.smallest_id = _reduce(min, tally.smallest_id, smallest)
    tally.largest_id = _reduce(max, tally.largest_id, largest)


def _reduce(choose: Callable[[int, int], int], first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return choose(first, second)
