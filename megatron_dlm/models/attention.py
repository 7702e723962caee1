"""Core attention of our own: every attention pattern, soft cap and sink."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.models.attention_visibility import (
    BlockDiffusion,
    Causal,
    Documents,
    Hidden,
    Visibility,
)
from megatron_dlm.models.dense_attention import dense_attention
from megatron_dlm.models.flexible_attention import flexible_attention
from megatron_dlm.models.head_sharding import sharded_by_heads
from megatron_dlm.models.packed import PackedDocuments
from megatron_dlm.ops.context_parallel import (
    gather_sequence,
    heads_for_slots,
    local_slots,
    slots_for_heads,
)


@dataclass(frozen=True)
class AttentionOptions:
    """What core attention computes, besides its shapes."""

    pattern: AttentionPattern
    block_size: int | None = None
    """Of the BLOCK pattern."""
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap)."""
    has_sink: bool = False
    """Whether a learned key and value without a position join the keys of every query."""

    @property
    def is_fused(self) -> bool:
        """Whether every library has a fast kernel for it: no mask, blocks, cap or sink."""
        is_simple = self.pattern in (AttentionPattern.CAUSAL, AttentionPattern.BIDIRECTIONAL)
        return is_simple and self.soft_cap is None and not self.has_sink


class CoreAttention(MegatronModule):
    """Attention over this rank's heads; grouped queries, dropout.

    Dense attention serves every case and every device: PyTorch's scaled_dot_product_attention, or
    an explicit fp32 softmax where scores are capped. On a GPU, flex attention takes over what has a
    mask, blocks, a cap or a sink; it knows no dropout, so dropout keeps the dense one.

    Where ranks share the sequence (context parallelism), a rank either fetches the keys and values
    of all slots for its own queries, or trades its slots for some heads of the whole sequence.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        options: AttentionOptions,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **_: object,
    ) -> None:
        """cp_comm_type: a2a trades slots for heads, everything else fetches keys and values."""
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        self.options = options
        head_size = config.kv_channels
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout_probability = dropout
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.trades_slots_for_heads = cp_comm_type == "a2a"
        if options.has_sink:
            shape = (config.num_query_groups // self.tp_group.size(), head_size)
            self.sink_key = _sink(shape, config.params_dtype)
            self.sink_value = _sink(shape, config.params_dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedDocuments | None = None,
        **_: object,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Of this rank's slots, s of S. attention_mask: bool [b or 1, 1, S, S], True hides a key; for
        ARBITRARY only. Packed documents are one row: query [t, heads, d] -> [t, heads * d] where
        one rank holds them all (`thd`), else b = 1. Each of them attends to itself alone, on the
        CPU at the cost of the sum of their squared lengths unless keys are fetched from other ranks
        (then the square of all).
        """
        is_arbitrary = self.options.pattern is AttentionPattern.ARBITRARY
        assert attention_mask is None or is_arbitrary, "the pattern is fixed by the layer spec"
        if query.dim() == 3:
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            return self._attend_whole(query, key, value, None, packed_seq_params).squeeze(1)
        if self.cp_group.size() == 1:
            return self._attend_whole(query, key, value, attention_mask, packed_seq_params)
        if self.trades_slots_for_heads:
            query, key, value = slots_for_heads((query, key, value), self.cp_group)
            output = self._attend_whole(query, key, value, attention_mask, packed_seq_params)
            return heads_for_slots(output, self.cp_group)
        key, value = gather_sequence(key, value, self.cp_group)
        rule = self._rule(key.shape[0], attention_mask, packed_seq_params)
        rank, size = self.cp_group.rank(), self.cp_group.size()
        places = local_slots(key.shape[0], query.device, rank=rank, size=size)
        return self._attend(query, key, value, rule, places=places)

    def _rule(
        self, length: int, attention_mask: Tensor | None, packed: PackedDocuments | None
    ) -> Visibility | None:
        """Of a whole sequence."""
        pattern = self.options.pattern
        if packed is not None:
            return Documents(packed.document_numbers, self._is_causal_inside())
        if pattern is AttentionPattern.CAUSAL:
            return Causal()
        if pattern is AttentionPattern.BLOCK:
            assert self.options.block_size is not None
            assert length % 2 == 0, f"{length} slots are not a noisy and a clean half"
            return BlockDiffusion(length // 2, self.options.block_size)
        return None if attention_mask is None else Hidden(attention_mask)

    def _is_causal_inside(self) -> bool:
        is_causal = self.options.pattern is AttentionPattern.CAUSAL
        assert is_causal or self.options.pattern is AttentionPattern.BIDIRECTIONAL
        return is_causal

    def _attend_whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed: PackedDocuments | None,
    ) -> Tensor:
        """Of all slots: [S, b, heads or groups, d] -> [S, b, heads * d]."""
        # One by one, flex attention would be compiled for every length of a document.
        if packed is None or self._is_flexible(query):
            rule = self._rule(query.shape[0], attention_mask, packed)
            return self._attend(query, key, value, rule)
        # split, not slices: its backward pass writes the gradient of the whole only once.
        parts = (part.split(packed.lengths) for part in (query, key, value))
        inside = Causal() if self._is_causal_inside() else None
        outputs = [self._attend(q, k, v, inside) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: Visibility | None,
        *,
        places: Tensor | None = None,
    ) -> Tensor:
        """query [q, b, heads, d], key and value [k, b, groups, d] -> [q, b, heads * d].

        places: see `dense_attention`.
        """
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attend = flexible_attention
        dropout = self._dropout()
        # The fast kernels know causal attention of equally many queries and keys only.
        is_masked = rule is not None and places is not None
        if not self._is_flexible(query, is_masked=is_masked):
            attend = partial(dense_attention, dropout=dropout)
        with self._dropout_state(dropout):
            output = attend(
                query,
                key,
                value,
                rule,
                scale=self.softmax_scale,
                places=places,
                soft_cap=self.options.soft_cap,
                sink=self._sink_of(key.shape[1]) if self.options.has_sink else None,
            )
        return output.permute(2, 0, 1, 3).flatten(2)  # from [b, heads, s, d]

    def _sink_of(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Keys and values [groups, d] of the sinks of the groups at hand, which may be a share."""
        share = self.cp_group.rank() if num_groups < len(self.sink_key) else 0
        own = slice(share * num_groups, (share + 1) * num_groups)
        return self.sink_key[own], self.sink_value[own]

    def _is_flexible(self, query: Tensor, *, is_masked: bool = False) -> bool:
        needs_mask = is_masked or not self.options.is_fused
        return query.is_cuda and needs_mask and self._dropout() == 0.0

    def _dropout(self) -> float:
        return self.dropout_probability if self.training else 0.0

    def _dropout_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        # Heads differ between TP ranks, so must their masks; under sequence parallelism the whole
        # layer already runs in the forked state.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The sinks of all heads, split over the TP ranks as the heads are."""
        return sharded_by_heads(self, prefix, sharded_offsets, metadata, self.tp_group)


def _sink(shape: tuple[int, int], dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter
