"""Token ids from the shards of a dataset, checked; and the documents of an order as one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_dlm.data.document_order import DocumentOrder
from megatron_dlm.data.storage.dataset import Dataset
from megatron_dlm.data.storage.shards import Shard


class Stretch(NamedTuple):
    """Neighbouring tokens of one document."""

    shard: int
    """Place of the shard in the dataset."""
    start: int
    """First token in the shard."""
    length: int


class TokenReader:
    """Reads stretches of a dataset; raises ValueError for ids that do not fit the model."""

    def __init__(self, dataset: Dataset, *, vocab_size: int, mask_token_id: int | None) -> None:
        self._dataset = dataset
        self._vocab_size, self._mask_token_id = vocab_size, mask_token_id
        self._shards: dict[int, Shard] = {}

    def read(self, stretches: Sequence[Stretch]) -> np.ndarray:
        """int64: the tokens of all stretches, back to back."""
        parts = [self._shard(place).tokens(start, length) for place, start, length in stretches]
        tokens = np.concatenate(parts).astype(np.int64)
        is_bad = (tokens < 0) | (tokens >= self._vocab_size)
        if self._mask_token_id is not None:
            is_bad |= tokens == self._mask_token_id
        if is_bad.any():
            raise self._explain(stretches, tokens, int(is_bad.argmax()))
        return tokens

    def _shard(self, place: int) -> Shard:
        if place not in self._shards:
            self._shards[place] = self._dataset.shard(place)
            self._shards[place].expect_random_reads()
        return self._shards[place]

    def _explain(self, stretches: Sequence[Stretch], tokens: np.ndarray, at: int) -> ValueError:
        """Name the shard that holds token number `at`."""
        ends = np.cumsum([stretch.length for stretch in stretches])
        stretch = stretches[int(np.searchsorted(ends, at, side="right"))]
        prefix, token = self._dataset.entries[stretch.shard].prefix, int(tokens[at])
        if token == self._mask_token_id:
            return ValueError(
                f"shard {prefix} holds token id {token}, the mask id (objective.mask_token_id); "
                "reserve an id for the mask that the text does not use"
            )
        return ValueError(
            f"shard {prefix} holds token id {token}, outside the vocabulary of {self._vocab_size} "
            "(model.vocab_size); train with the tokenizer that made the shard"
        )


class TokenStream:
    """All documents of an order back to back, without a seam between blocks or shards."""

    def __init__(self, order: DocumentOrder, reader: TokenReader) -> None:
        self._order, self._reader = order, reader

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + length) of the stream, int64, and of which documents they are.

        The second array numbers the documents of the stretch 0, 1, 2 …, int64 [length].
        """
        assert 0 <= start <= self._order.num_tokens - length, (start, length)
        stretches = self._stretches(start, start + length)
        lengths = [stretch.length for stretch in stretches]
        return self._reader.read(stretches), np.repeat(np.arange(len(lengths)), lengths)

    def _stretches(self, start: int, end: int) -> list[Stretch]:
        found = []
        number = self._order.block_at(start)
        while start < end:
            block = self._order.block(number)
            first = int(np.searchsorted(block.bounds, start, side="right")) - 1
            last = int(np.searchsorted(block.bounds, end, side="left"))
            for place in range(first, min(last, len(block.starts))):
                begin, stop = int(block.bounds[place]), int(block.bounds[place + 1])
                stop = min(stop, end)
                if start < stop:
                    source = int(block.starts[place]) + start - begin
                    found.append(Stretch(int(block.shards[place]), source, stop - start))
                    start = stop
            number += 1
        return found
