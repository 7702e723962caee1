"""The unique tokens of one shard as a stream: whole documents in a seeded order, the last cut."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_dlm.data.order import permute
from megatron_dlm.data.shards import Shard

# Places are kept for every 32nd document of the order only; the documents between are found again
# by the permutation. A window then touches few pages of the index; memory is 1/4 byte a document.
_BLOCK_DOCUMENTS = 32
_SCAN_DOCUMENTS = _BLOCK_DOCUMENTS * 2048
_CACHED_BLOCKS = 8192


class TokenStream:
    """The first `num_tokens` tokens of the shard's documents in the order that `key` selects.

    A shorter stream with the same key is a prefix of a longer one, so budgets are nested.
    """

    def __init__(self, shard: Shard, *, num_tokens: int, key: int) -> None:
        assert 0 < num_tokens <= shard.num_tokens, (num_tokens, shard.num_tokens)
        self.shard, self.num_tokens, self._key = shard, num_tokens, key
        self._block_starts = self._scan()
        self._block = lru_cache(maxsize=_CACHED_BLOCKS)(self._load_block)

    def read(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens [start, start + length) of the stream."""
        assert 0 <= start <= self.num_tokens - length, (start, length)
        tokens = np.empty(length, dtype=np.int64)
        block = int(np.searchsorted(self._block_starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            sources, bounds = self._block(block)
            document = int(np.searchsorted(bounds, start + filled, side="right")) - 1
            while filled < length and document < len(sources):
                offset = start + filled - int(bounds[document])
                count = min(int(bounds[document + 1] - bounds[document]) - offset, length - filled)
                source = int(sources[document]) + offset
                tokens[filled : filled + count] = self.shard.tokens(source, count)
                filled += count
                document += 1
            block += 1
        return tokens

    def _documents(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Start in the file and length of documents [first, first + count) of the order."""
        size = self.shard.num_documents
        places = np.arange(first, min(first + count, size), dtype=np.int64)
        documents = permute(places, size=size, key=self._key)
        starts = self.shard.document_starts(documents)
        return starts, self.shard.document_starts(documents + 1) - starts

    def _scan(self) -> np.ndarray:
        """int64: where each block begins in the stream, for the documents inside the budget."""
        found, total, first = [], 0, 0
        while total < self.num_tokens:
            _, lengths = self._documents(first, _SCAN_DOCUMENTS)
            ends = total + np.cumsum(lengths)
            begins = (ends - lengths)[::_BLOCK_DOCUMENTS]
            found.append(begins[begins < self.num_tokens])
            total, first = int(ends[-1]), first + _SCAN_DOCUMENTS
        return np.concatenate(found)

    def _load_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Start in the file of each document of the block, and their bounds in the stream."""
        starts, lengths = self._documents(block * _BLOCK_DOCUMENTS, _BLOCK_DOCUMENTS)
        bounds = np.full(len(lengths) + 1, self._block_starts[block], dtype=np.int64)
        bounds[1:] += np.cumsum(lengths)
        return starts, bounds
