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
        **_: object,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        assert config.context_parallel_size == 1, "keys of other ranks are not fetched"
        self.options = options
        head_size = config.kv_channels
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout_probability = dropout
        self.tp_group = pg_collection.tp
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

        attention_mask: bool [b or 1, 1, s, s], True hides a key; for ARBITRARY only. Packed
        documents have no batch dimension: query [t, heads, d] -> [t, heads * d]. Each of them
        attends to itself alone, at the cost of the sum of their squared lengths.
        """
        is_arbitrary = self.options.pattern is AttentionPattern.ARBITRARY
        assert attention_mask is None or is_arbitrary, "the pattern is fixed by the layer spec"
        if packed_seq_params is not None:
            assert self.options.pattern in (AttentionPattern.CAUSAL, AttentionPattern.BIDIRECTIONAL)
            return self._attend_inside(query, key, value, packed_seq_params)
        return self._attend(query, key, value, self._rule(query.shape[0], attention_mask))

    def _rule(self, length: int, attention_mask: Tensor | None) -> Visibility | None:
        pattern = self.options.pattern
        if pattern is AttentionPattern.CAUSAL:
            return Causal()
        if pattern is AttentionPattern.BLOCK:
            assert self.options.block_size is not None
            assert length % 2 == 0, f"{length} slots are not a noisy and a clean half"
            return BlockDiffusion(length // 2, self.options.block_size)
        return None if attention_mask is None else Hidden(attention_mask)

    def _attend_inside(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments
    ) -> Tensor:
        """[t, heads or groups, d] -> [t, heads * d]."""
        is_causal = self.options.pattern is AttentionPattern.CAUSAL
        query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        if self._is_flexible(query):  # one by one they would be compiled for every length
            inside = Documents(packed.document_numbers, is_causal)
            return self._attend(query, key, value, inside).squeeze(1)
        # split, not slices: its backward pass writes the gradient of the whole only once.
        parts = (part.split(packed.lengths) for part in (query, key, value))
        rule = Causal() if is_causal else None
        outputs = [self._attend(q, k, v, rule) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Visibility | None) -> Tensor:
        """[s, b, heads or groups, d] -> [s, b, heads * d]."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attend = flexible_attention
        dropout = self._dropout()
        if not self._is_flexible(query):
            attend = partial(dense_attention, dropout=dropout)
        with self._dropout_state(dropout):
            output = attend(
                query,
                key,
                value,
                rule,
                scale=self.softmax_scale,
                soft_cap=self.options.soft_cap,
                sink=(self.sink_key, self.sink_value) if self.options.has_sink else None,
            )
        return output.permute(2, 0, 1, 3).flatten(2)  # from [b, heads, s, d]

    def _is_flexible(self, query: Tensor) -> bool:
        return query.is_cuda and not self.options.is_fused and self._dropout() == 0.0

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
