"""Core attention of the local layer implementation: PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dlm.models.packed import PackedDocuments


class ScaledDotProductAttention(MegatronModule):
    """Causal or bidirectional attention over this rank's heads; grouped queries, dropout.

    No [s, s] score matrix is stored, unlike in Megatron Core's local core attention.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), attn_mask_type
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout_probability = dropout

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

        Packed documents have no batch dimension: query [t, heads, d] -> [t, heads * d]. Each of
        them attends to itself alone, at the cost of the sum of their squared lengths.
        """
        assert attention_mask is None, "the pattern is fixed by the layer spec"
        dropout = self.dropout_probability if self.training else 0.0
        with self._dropout_state(dropout):
            if packed_seq_params is None:
                return self._attend(query, key, value, dropout).flatten(2)
            # split, not slices: its backward pass writes the gradient of the whole only once.
            lengths = packed_seq_params.lengths
            parts = (part.unsqueeze(1).split(lengths) for part in (query, key, value))
            documents = [self._attend(q, k, v, dropout) for q, k, v in zip(*parts, strict=True)]
            return torch.cat(documents).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """[s, b, heads or groups, d] -> [s, b, heads, d]."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        output = scaled_dot_product_attention(  # all [b, heads, s, d]
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.permute(2, 0, 1, 3)

    def _dropout_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        # Heads differ between TP ranks, so must their masks; under sequence parallelism the whole
        # layer already runs in the forked state.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()
