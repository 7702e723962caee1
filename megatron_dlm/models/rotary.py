"""Rotary positions of a sequence whose two halves stand at the same places."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn


class TwofoldRotary(nn.Module):
    """Positions 0 to S-1 twice, for [noisy; clean].

    Megatron Core's own gives every slot the position of its place, whatever position_ids say.
    """

    def __init__(self, once: RotaryEmbedding) -> None:
        super().__init__()
        self.once = once

    def get_rotary_seq_len(self, *arguments: Any) -> int:
        """The slots of the whole sequence, also where a rank holds a part of it."""
        return int(self.once.get_rotary_seq_len(*arguments))

    def forward(self, max_seq_len: int, **arguments: Any) -> Tensor:
        """Angles of 2S slots, [2S, 1, 1, d]."""
        assert max_seq_len % 2 == 0, f"{max_seq_len} slots are not a noisy and a clean half"
        half = self.once(max_seq_len // 2, **arguments)
        return torch.cat([half, half])
