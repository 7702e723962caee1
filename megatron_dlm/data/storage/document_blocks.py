"""Read a shard from its first document to its last, in blocks of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_dlm.data.storage.shards import Shard

_INDEX_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents of a shard, read from its file and not through its map."""

    first: int
    """Number of the first document."""
    start: int
    """Place of its first token in the file."""
    bounds: np.ndarray
    """int64 [documents + 1]: where each document begins in `tokens`, and the end."""
    tokens: np.ndarray
    """Ids of all of them, back to back."""

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1


def read_blocks(shard: Shard, *, block_tokens: int = 1 << 20) -> Iterator[DocumentBlock]:
    """All documents in file order; a block holds at most `block_tokens`, or one longer document.

    Raises ValueError where the index is damaged or the file is cut meanwhile.
    """
    with open(f"{shard.prefix}.bin", "rb") as stream:
        for first, starts in _cut(shard, block_tokens):
            bounds = starts - starts[0]
            tokens = np.fromfile(stream, dtype=shard.dtype, count=int(bounds[-1]))
            if len(tokens) < bounds[-1]:
                raise ValueError(f"{shard.prefix}.bin was cut while it was read")
            yield DocumentBlock(first, int(starts[0]), bounds, tokens)


def _cut(shard: Shard, block_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """Like `read_starts`, in pieces of the size of a block."""
    for first, starts in read_starts(shard):
        begin = 0
        while begin < len(starts) - 1:
            limit = int(starts[begin]) + block_tokens
            end = max(begin + 1, int(np.searchsorted(starts, limit, side="right")) - 1)
            yield first + begin, starts[begin : end + 1]
            begin = end


def read_starts(shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
    """Number of a document, and int64 [n + 1]: first token of it and of those that follow, and the
    end; some ten thousands at a time."""
    for first in range(0, shard.num_documents, _INDEX_DOCUMENTS):
        last = min(first + _INDEX_DOCUMENTS, shard.num_documents)
        numbers = np.arange(first, last)
        starts, lengths = shard.document_spans(numbers)
        yield first, np.append(starts, starts[-1] + lengths[-1])


def text_bounds(block: DocumentBlock, eod_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n], int64 [n]: where each document begins and ends in `tokens`, one final end-of-
    document token left out."""
    starts, ends = block.bounds[:-1], block.bounds[1:].copy()
    if eod_id is not None:
        full = np.flatnonzero(ends > starts)
        ends[full] -= block.tokens[ends[full] - 1] == eod_id
    return starts, ends


def document_digests(block: DocumentBlock, eod_id: int | None) -> np.ndarray:
    """uint64 [n]: BLAKE2b-64 of each document's ids as little-endian int32.

    The same text under the same tokenizer gives the same number: a final end-of-document token and
    the width of the stored ids do not count.
    """
    starts, ends = text_bounds(block, eod_id)
    data = block.tokens.astype("<i4").view(np.uint8).data
    digests = [
        hashlib.blake2b(data[4 * start : 4 * end], digest_size=8).digest()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")
