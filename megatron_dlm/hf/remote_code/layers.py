"""Norms, attention and the layer that they make with an MLP or experts.

Shapes: b rows, s slots, h hidden size, H query heads, G key-value heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from .configuration_megatron_dlm import MegatronDLMConfig
from .experts import MLP, MixtureOfExperts
from .rotary import rotate
from .visibility import Visibility

_LARGEST_SCORES = 2**26  # held at once where scores are capped; 256 MiB in fp32


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension; the weight is the gain, or the gain minus one."""

    def __init__(self, size: int, config: MegatronDLMConfig) -> None:
        super().__init__()
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = config.rms_norm_eps
        self.reset()

    def reset(self) -> None:
        """Gain 1."""
        nn.init.constant_(self.weight, 0.0 if self.is_zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_zero_centered:
            return rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # One plus a small number would lose it in bf16.
        gain = 1 + self.weight.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(x.to(gain.dtype), (x.shape[-1],), gain, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: MegatronDLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        hidden, bias, width = config.hidden_size, config.attention_bias, config.head_dim
        query_width, key_width = (count * width for count in self.heads)
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norms_heads = config.qk_layernorm_scope == "head"
        if config.qk_layernorm:
            sizes = (width, width) if self.norms_heads else (query_width, key_width)
            self.q_norm, self.k_norm = (RMSNorm(size, config) for size in sizes)
        self.softcap = config.attn_logit_softcapping
        self.sink_key = self.sink_value = None
        if config.attention_sink:
            shape = (config.num_key_value_heads, width)
            self.sink_key, self.sink_value = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: Visibility) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        query_heads, key_heads = self.heads
        query = rotate(self._normed(self.q_norm, self.q_proj(x), query_heads), *rotary)
        key = rotate(self._normed(self.k_norm, self.k_proj(x), key_heads), *rotary)
        value = _split(self.v_proj(x), key_heads)
        if seen.cache is not None and seen.slots is not None:
            key, value = seen.cache.write(self.layer, seen.slots, key, value)
        mask = seen.mask
        if self.sink_key is not None and self.sink_value is not None:
            # One slot in front, seen by all.
            key, value = _behind(self.sink_key, key), _behind(self.sink_value, value)
            mask = None if mask is None else pad(mask, (1, 0), value=True)
        mixed = attend(query, key, value, mask, is_causal=seen.is_causal, softcap=self.softcap)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _normed(self, norm: nn.Module, x: Tensor, heads: int) -> Tensor:
        """[b, s, heads * d] -> [b, heads, s, d]."""
        return norm(_split(x, heads)) if self.norms_heads else _split(norm(x), heads)


class Layer(nn.Module):
    """Attention and MLP or experts, each behind a norm and added to its input."""

    def __init__(self, config: MegatronDLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.has_experts = config.has_experts(layer)
        if self.has_experts:
            self.mlp: nn.Module = MixtureOfExperts(config)
        else:
            self.mlp = MLP(config, config.intermediate_size)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: Visibility) -> Tensor:
        x = x + self.multiplier * self.self_attn(self.input_layernorm(x), rotary, seen)
        normed = self.post_attention_layernorm(x)
        mixed = self.mlp(normed, seen.real) if self.has_experts else self.mlp(normed)
        return x + self.multiplier * mixed


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    softcap: float | None,
) -> Tensor:
    """[b, H, s, d] of query [b, H, s, d], key and value [b, G, L, d], mask [b, 1, s, L].

    With a soft cap c a score x counts as c tanh(x / c), and is_causal must be said by the mask.
    """
    times = query.shape[1] // key.shape[1]
    if times > 1 and (mask is not None or softcap is not None):
        # The fast kernels take a mask or grouped queries, not both.
        key, value = (part.repeat_interleave(times, 1) for part in (key, value))
        times = 1
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, enable_gqa=times > 1
        )
    assert not is_causal
    # Some queries at a time: the scores of all would not fit.
    size = max(1, _LARGEST_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    queries = query.split(size, dim=2)
    masks = [None] * len(queries) if mask is None else mask.split(size, dim=2)
    mixed = [
        _soft_capped(part, key, value, seen, softcap)
        for part, seen in zip(queries, masks, strict=True)
    ]
    return torch.cat(mixed, dim=2)


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float
) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value.to(dtype)).to(query.dtype)


def _split(x: Tensor, heads: int) -> Tensor:
    """[b, s, heads * d] -> [b, heads, s, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _behind(sink: Tensor, kept: Tensor) -> Tensor:
    """sink [G, d] before kept [b, G, L, d]."""
    return torch.cat([sink[None, :, None].to(kept).expand(len(kept), -1, -1, -1), kept], dim=2)
