"""Rotary positions of the slots that this rank holds."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dlm.models.packed import PackedDocuments
from megatron_dlm.ops.context_parallel import local_part


class LocalRotary(nn.Module):
    """Megatron Core's angles of a whole sequence, of which every CP rank takes those of its slots.

    Megatron Core's own gives every slot the position of its place, whatever position_ids say; here
    the positions of block diffusion run twice, for [noisy; clean], and those of split documents
    begin anew in each.
    """

    def __init__(self, once: RotaryEmbedding, cp_group: ProcessGroup, *, is_twofold: bool) -> None:
        super().__init__()
        self.once = once
        once.cp_group = None  # we cut; its cache of angles would keep the group alive for ever
        self.place = {"rank": cp_group.rank(), "size": cp_group.size()}
        self.is_twofold = is_twofold

    def get_rotary_seq_len(self, *arguments: Any) -> int:
        """The slots of the whole sequence, also where a rank holds a part of it."""
        return int(self.once.get_rotary_seq_len(*arguments))

    def forward(self, max_seq_len: int, *, packed_seq: bool = False, **_: Any) -> Tensor:
        """Angles [s, 1, 1, d] of this rank's slots of max_seq_len; packed_seq: of all of them."""
        if packed_seq:  # Megatron Core counts in every document for itself
            return self._angles(max_seq_len)
        if not self.is_twofold:
            return local_part(self._angles(max_seq_len), 0, **self.place)
        assert max_seq_len % 2 == 0, f"{max_seq_len} slots are not a noisy and a clean half"
        half = self._angles(max_seq_len // 2)
        return local_part(torch.cat([half, half]), 0, **self.place)

    def inside(self, documents: PackedDocuments) -> Tensor:
        """Angles [t, 1, 1, d] of this rank's slots of a sequence of documents."""
        positions = local_part(documents.positions, 0, **self.place)
        return self._angles(max(documents.lengths))[positions]

    def _angles(self, length: int) -> Tensor:
        whole: Tensor = self.once(length, packed_seq=True)  # packed means: not cut for CP
        return whole
