"""The whole model written down once more in float64, from its formulas and its checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig


def reference_logits(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    tokens: Tensor,
    visible: Tensor,
    place: Tensor,
) -> Tensor:
    """Logits [b, s, V] of tokens [b, s]; visible bool [b or 1, s, s], place int [s] (rotary)."""
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    angles = _angles(model, place)
    for layer in range(model.num_layers):
        parts = {
            name.removeprefix("decoder.layers."): values[layer]
            for name, values in weights.items()
            if name.startswith("decoder.layers.")
        }
        branch = _attention(parts, model, hidden, visible, angles)
        hidden = hidden + model.residual_multiplier * branch
        branch = _mlp(parts, model, hidden)
        hidden = hidden + model.residual_multiplier * branch
    hidden = _norm(hidden, weights["decoder.final_layernorm.weight"], model)
    tied = weights["embedding.word_embeddings.weight"]
    return hidden @ weights.get("output_layer.weight", tied).T * model.output_multiplier


def _norm(values: Tensor, gain: Tensor, model: ModelConfig) -> Tensor:
    rms = values.square().mean(-1, keepdim=True).add(model.normalization_epsilon).sqrt()
    return values / rms * (1 + gain if model.layernorm_zero_centered_gamma else gain)


def _attention(
    parts: Mapping[str, Tensor], model: ModelConfig, hidden: Tensor, visible: Tensor, angles: Tensor
) -> Tensor:
    rows, length, _ = hidden.shape
    size, groups = model.head_size, model.query_groups
    repeats = model.num_attention_heads // groups
    hidden = _norm(hidden, parts["self_attention.linear_qkv.layer_norm_weight"], model)
    # Of every group: its query heads, its key, its value.
    mixed = hidden @ parts["self_attention.linear_qkv.weight"].T
    mixed = mixed.view(rows, length, groups, repeats + 2, size)
    query = mixed[:, :, :, :repeats].reshape(rows, length, groups * repeats, size)
    key, value = mixed[:, :, :, repeats], mixed[:, :, :, repeats + 1]
    if model.qk_layernorm:
        gains = (parts[f"self_attention.{name}_layernorm.weight"] for name in "qk")
        is_full = model.qk_layernorm_scope == "full"
        query, key = (
            _norm(part.flatten(2) if is_full else part, gain, model).view(part.shape)
            for part, gain in zip((query, key), gains, strict=True)
        )
    query, key = (_rotate(part, angles) for part in (query, key))
    key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
    if model.attention_sink:
        sinks = (parts[f"self_attention.core_attention.sink_{name}"] for name in ("key", "value"))
        sink_key, sink_value = (part.repeat_interleave(repeats, dim=0) for part in sinks)
        extra = torch.einsum("bqhd,hd->bhq", query, sink_key) / size**0.5
        scores = torch.cat([scores, extra[..., None]], dim=3)
        value = torch.cat([value, sink_value[None, None].expand(rows, -1, -1, -1)], dim=1)
        visible = torch.nn.functional.pad(visible, (0, 1), value=True)
    if model.attn_logit_softcapping is not None:
        scores = model.attn_logit_softcapping * torch.tanh(scores / model.attn_logit_softcapping)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(3)
    output = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    return output @ parts["self_attention.linear_proj.weight"].T


def _mlp(parts: Mapping[str, Tensor], model: ModelConfig, hidden: Tensor) -> Tensor:
    hidden = _norm(hidden, parts["mlp.linear_fc1.layer_norm_weight"], model)
    inner = hidden @ parts["mlp.linear_fc1.weight"].T
    if model.mlp_bias:
        inner = inner + parts["mlp.linear_fc1.bias"]
    if model.activation == "swiglu":
        gate, up = inner.chunk(2, dim=2)
        inner = torch.nn.functional.silu(gate) * up
    elif model.activation == "squared_relu":
        inner = inner.relu().square()
    else:
        inner = torch.nn.functional.gelu(inner)
    output = inner @ parts["mlp.linear_fc2.weight"].T
    return output + parts["mlp.linear_fc2.bias"] if model.mlp_bias else output


def _angles(model: ModelConfig, place: Tensor) -> Tensor:
    size = model.head_size
    periods = model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return place[:, None] / periods  # [s, d / 2]


def _rotate(part: Tensor, angles: Tensor) -> Tensor:
    """[b, s, heads, d]: number k of a head turns with number k + d / 2."""
    first, second = part.chunk(2, dim=3)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=3)
