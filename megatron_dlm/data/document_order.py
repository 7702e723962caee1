"""In which order the documents of a dataset follow each other: two functions of a seed, no tables.

Both orders give their documents in blocks, which are found again whenever they are needed:
- `BudgetOrder` mixes all documents of the dataset, so that any number of them is a fair sample of
  the whole. A smaller budget is a prefix of a larger one, and how the text is cut into shards does
  not matter. Opening it reads the lengths of the documents in the budget.
- `WholeOrder` is for a dataset that is used whole: shard after shard, the documents mixed within
  groups of neighbours. Opening it reads nothing at all, a group is read when it is first touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from megatron_dlm.data.order import derive_key, permute
from megatron_dlm.data.storage.dataset import Dataset
from megatron_dlm.data.storage.shards import Shard

GROUP_DOCUMENTS = 1024
"""Documents of a group of `WholeOrder`, and of every block that is packed by itself."""
# A block start is kept for this many documents of a budget, 1/4 byte a document, and a window
# touches few pages of the index.
_BLOCK_DOCUMENTS = 32
# Up to here single look-ups in a shard cost less than arrays.
_FEW_DOCUMENTS = 16
# Large enough that the documents of one scan in file order lie close together.
_SCAN_DOCUMENTS = 1 << 18
# A few MB. Windows lie all over the corpus: a larger cache would help corpora of one size only.
_CACHED_DOCUMENTS = 1 << 17


@dataclass(frozen=True)
class Block:
    """Documents that follow each other in an order; n of them."""

    shards: np.ndarray
    """int64 [n]: place of the document's shard in the dataset."""
    starts: np.ndarray
    """int64 [n]: first token in the shard."""
    bounds: np.ndarray
    """int64 [n + 1]: where each document begins in the order, counted in tokens, and the end."""

    def part(self, first: int, last: int) -> Block:
        """Documents [first, last) of the block."""
        return Block(
            self.shards[first:last], self.starts[first:last], self.bounds[first : last + 1]
        )

    def cut(self, end: int) -> Block:
        """The documents that begin before token `end` of the order, the last one cut there."""
        count = int(np.searchsorted(self.bounds[:-1], end, side="left"))
        kept = self.part(0, count)
        return Block(kept.shards, kept.starts, np.minimum(kept.bounds, end))


class DocumentOrder(Protocol):
    """The first `num_tokens` tokens of the documents of a dataset in some order."""

    dataset: Dataset
    num_tokens: int

    @property
    def num_blocks(self) -> int: ...

    def block_at(self, token: int) -> int:
        """Number of the block that holds this token of the order."""
        ...

    def block(self, number: int) -> Block:
        """The documents of a block; the last one is cut where the order ends."""
        ...

    def blocks(self) -> Iterator[Block]:
        """All blocks in turn, none of them kept."""
        ...

    def prepare(self) -> None:
        """Read now what would be read at first use."""
        ...


class BudgetOrder:
    """The first `num_tokens` tokens of all documents in the order that `key` selects."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_tokens: int,
        key: int,
        block_documents: int = _BLOCK_DOCUMENTS,
    ) -> None:
        assert 0 < num_tokens <= dataset.num_tokens, (num_tokens, dataset.num_tokens)
        self.dataset, self.num_tokens = dataset, num_tokens
        self._key, self._block_documents = key, block_documents
        self.block = lru_cache(maxsize=_CACHED_DOCUMENTS // block_documents)(self._load_block)

    @property
    def num_blocks(self) -> int:
        return len(self._block_starts)

    def block_at(self, token: int) -> int:
        return int(np.searchsorted(self._block_starts, token, side="right")) - 1

    def prepare(self) -> None:
        _ = self._block_starts

    def blocks(self) -> Iterator[Block]:
        size = self._block_documents
        for run in self._scan():
            for first in range(0, len(run.starts), size):
                if run.bounds[first] < self.num_tokens:
                    yield run.part(first, first + size).cut(self.num_tokens)

    @cached_property
    def _block_starts(self) -> np.ndarray:
        """int64: where each block begins in the order, for the documents inside the budget."""
        begins = [run.bounds[:-1][:: self._block_documents] for run in self._scan()]
        found = np.concatenate(begins)
        return found[found < self.num_tokens]

    def _scan(self) -> Iterator[Block]:
        """All documents inside the budget, and a few more, in runs of whole blocks."""
        total, first = 0, 0
        while total < self.num_tokens:
            assert first < self.dataset.num_documents, "the documents hold all tokens"
            count = self._scan_size(self.num_tokens - total)
            run = self._documents(first, count, begin=total)
            yield run
            total, first = int(run.bounds[-1]), first + count

    def _scan_size(self, num_tokens: int) -> int:
        """Whole blocks that probably hold this many tokens, but no more than fit into memory."""
        expected = num_tokens * self.dataset.num_documents // self.dataset.num_tokens
        blocks = min(expected, _SCAN_DOCUMENTS) // self._block_documents + 1
        return blocks * self._block_documents

    def _load_block(self, number: int) -> Block:
        size, begin = self._block_documents, int(self._block_starts[number])
        return self._documents(number * size, size, begin=begin).cut(self.num_tokens)

    def _documents(self, first: int, count: int, *, begin: int) -> Block:
        """Documents [first, first + count) of the order, which begin there in the stream."""
        size = self.dataset.num_documents
        places = np.arange(first, min(first + count, size), dtype=np.int64)
        shards, starts, lengths = _read_spans(
            self.dataset, permute(places, size=size, key=self._key)
        )
        return Block(shards, starts, _bounds(begin, lengths))


class WholeOrder:
    """All documents: shards as they are listed, groups of neighbours mixed as `key` says."""

    def __init__(self, dataset: Dataset, *, key: int) -> None:
        assert dataset.num_tokens > 0, dataset.prefix
        self.dataset, self.num_tokens, self._key = dataset, dataset.num_tokens, key
        groups = -(-np.diff(dataset.first_documents) // GROUP_DOCUMENTS)
        self._first_groups = np.concatenate([[0], np.cumsum(groups)])
        self._group_starts: dict[int, np.ndarray] = {}
        self.block = lru_cache(maxsize=_CACHED_DOCUMENTS // GROUP_DOCUMENTS)(self._load_block)

    @property
    def num_blocks(self) -> int:
        return int(self._first_groups[-1])

    def block_at(self, token: int) -> int:
        first_tokens = self.dataset.first_tokens
        place = int(np.searchsorted(first_tokens, token, side="right")) - 1
        starts = self._starts_in(place)
        group = int(np.searchsorted(starts, token - first_tokens[place], side="right")) - 1
        return int(self._first_groups[place]) + group

    def blocks(self) -> Iterator[Block]:
        return map(self._load_block, range(self.num_blocks))

    def prepare(self) -> None:
        """Nothing: shards are opened as they are reached."""

    def _starts_in(self, place: int) -> np.ndarray:
        """int64: first token of every group of a shard."""
        if place not in self._group_starts:
            shard = self.dataset.shard(place)
            firsts = np.arange(0, shard.num_documents, GROUP_DOCUMENTS)
            self._group_starts[place] = shard.document_starts(firsts)
        return self._group_starts[place]

    def _load_block(self, number: int) -> Block:
        place = int(np.searchsorted(self._first_groups, number, side="right")) - 1
        group = number - int(self._first_groups[place])
        first = group * GROUP_DOCUMENTS
        shard = self.dataset.shard(place)
        size = min(GROUP_DOCUMENTS, shard.num_documents - first)
        # The first group has the key itself: a small dataset has the order of its whole budget.
        key = derive_key(self._key, number) if number else self._key
        documents = first + permute(np.arange(size, dtype=np.int64), size=size, key=key)
        starts, lengths = shard.document_spans(documents)
        begin = int(self.dataset.first_tokens[place] + self._starts_in(place)[group])
        return Block(np.full(size, place), starts, _bounds(begin, lengths))


def _bounds(begin: int, lengths: np.ndarray) -> np.ndarray:
    bounds = np.full(len(lengths) + 1, begin, dtype=np.int64)
    bounds[1:] += np.cumsum(lengths)
    return bounds


def _read_spans(
    dataset: Dataset, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, first token in it, and length of each document, int64 [n] each.

    Every index is read front to back.
    """
    order = np.argsort(documents)
    ordered = documents[order]
    edges = np.searchsorted(ordered, dataset.first_documents)
    shards, starts, lengths = (np.empty(len(documents), dtype=np.int64) for _ in range(3))
    for place in np.flatnonzero(np.diff(edges)).tolist():
        part = slice(int(edges[place]), int(edges[place + 1]))
        local, given = ordered[part] - dataset.first_documents[place], order[part]
        shards[given] = place
        starts[given], lengths[given] = _spans(dataset.shard(place), local)
    return shards, starts, lengths


def _spans(shard: Shard, documents: np.ndarray) -> tuple[Any, Any]:
    """First token and length of each document."""
    if len(documents) > _FEW_DOCUMENTS:
        return shard.document_spans(documents)
    spans = [shard.document_span(number) for number in documents.tolist()]
    return [start for start, _ in spans], [length for _, length in spans]
