"""Which keys a query may see: one rule per pattern, read by dense and by flex attention alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Causal:
    """Keys up to the query itself."""

    def visible(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """bool of the broadcast shape of three integer tensors: sample, query slot, key slot."""
        return key <= query


@dataclass(frozen=True)
class BlockDiffusion:
    """[noisy; clean] of `half` slots each, in blocks of `block` slots; the last may be shorter.

    A noisy slot sees the noisy slots of its own block and the clean slots of all blocks before; a
    clean slot sees the clean slots of its own block and of all before (Arriola et al. 2025).
    """

    half: int
    block: int

    def visible(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Causal.visible`."""
        query_is_noisy, key_is_noisy = query < self.half, key < self.half
        query_block, key_block = (slot % self.half // self.block for slot in (query, key))
        own_noise = query_is_noisy & key_is_noisy & (query_block == key_block)
        earlier = (key_block < query_block) | (~query_is_noisy & (key_block == query_block))
        return own_noise | (~key_is_noisy & earlier)


@dataclass(frozen=True, eq=False)
class Hidden:
    """All keys but those that a mask hides; equal where two look at the same numbers in memory.

    Recomputation hands every layer a tensor of its own over one mask.
    """

    mask: Tensor
    """bool [b or 1, 1, s, s], True hides the key."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden) and self._memory == other._memory

    def __hash__(self) -> int:
        return hash(self._memory)

    @property
    def _memory(self) -> tuple[object, ...]:
        mask = self.mask  # whoever keeps it as a key keeps the memory from being used again
        return mask.data_ptr(), mask.shape, mask.stride(), mask._version

    def visible(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Causal.visible`."""
        return ~self.mask[row if len(self.mask) > 1 else 0, 0, query, key]


@dataclass(frozen=True)
class Documents:
    """Keys of the query's own document."""

    number: Tensor
    """int [t], equal inside a document and nowhere else."""
    is_causal: bool

    def visible(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See `Causal.visible`."""
        is_own = self.number[query] == self.number[key]
        return is_own & (key <= query) if self.is_causal else is_own


Visibility = Causal | BlockDiffusion | Hidden | Documents


def visible_keys(
    rule: Visibility, queries: Tensor | None, num_keys: int, device: torch.device
) -> Tensor:
    """bool [b or 1, 1, queries, keys], True where the query sees the key.

    queries: int64 [q], the places of the queries among the keys; None: every key has its query.
    """
    if isinstance(rule, Hidden):
        mask = rule.mask if queries is None else rule.mask[:, :, queries]
        return ~mask
    return _visible_keys(rule, queries, num_keys, device)


@lru_cache(maxsize=8)  # the layers of a model, and its few lengths, share them
def _visible_keys(
    rule: Visibility, queries: Tensor | None, num_keys: int, device: torch.device
) -> Tensor:
    keys = torch.arange(num_keys, device=device)
    queries = keys if queries is None else queries
    return rule.visible(torch.zeros_like(keys[:1]), queries[:, None], keys[None, :])[None, None]
