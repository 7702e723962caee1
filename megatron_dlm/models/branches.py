"""Parts of a layer's branches that Megatron Core has no switch for: biases and a multiplier."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from megatron.core.jit import jit_fuser
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_OutputAndBias = tuple[Tensor, Tensor | None]


class UnbiasedSelfAttention(SelfAttention):
    """Attention without biases in a model whose MLP has some: Megatron Core has one switch."""

    def __init__(self, config: TransformerConfig, **arguments: object) -> None:
        without_bias = copy.copy(config)
        without_bias.add_bias_linear = False
        super().__init__(without_bias, **arguments)


def scaled_addition(
    multiplier: float,
) -> Callable[[bool, bool], Callable[[_OutputAndBias, Tensor, float], Tensor]]:
    """Megatron Core's bias-dropout-add: residual + dropout(multiplier * (output + bias))."""

    def choose(training: bool, fused: bool) -> Callable[[_OutputAndBias, Tensor, float], Tensor]:
        add = _fused_addition if fused else _addition

        def scaled(branch: _OutputAndBias, residual: Tensor, probability: float) -> Tensor:
            output, bias = branch
            dropout = probability if training else 0.0
            return add(output, bias, residual, multiplier, dropout)

        return scaled

    return choose


def _addition(
    output: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float, dropout: float
) -> Tensor:
    if bias is not None:
        output = output + bias
    output = torch.nn.functional.dropout(output, dropout)
    # As Megatron Core's own: a residual of another precision takes that of the branch.
    return torch.add(residual.to(output.dtype), output, alpha=multiplier)


_fused_addition = jit_fuser(_addition)
