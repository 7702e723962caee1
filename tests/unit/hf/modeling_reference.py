"""The shipped model once more: float64, number by number, from its definition alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Visible = Callable[[int, int], bool]
"""Whether the first slot, the query, sees the second."""
Array = np.ndarray[Any, Any]


def reference_logits(
    config: Any, weights: dict[str, Array], tokens: list[int], positions: list[int], sees: Visible
) -> Array:
    """Logits [s, V] of one row; config is a MegatronDLMConfig, weights its state dict."""
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        normed = _norm(config, x, own["input_layernorm.weight"])
        x = x + config.residual_multiplier * _attention(config, own, normed, positions, sees)
        normed = _norm(config, x, own["post_attention_layernorm.weight"])
        x = x + config.residual_multiplier * _mlp(config, own, normed)
    table = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _norm(config, x, weights["model.norm.weight"]) @ table.T * config.output_multiplier


def _norm(config: Any, x: Array, weight: Array) -> Array:
    gain = 1 + weight if config.layernorm_zero_centered_gamma else weight
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * gain


def _attention(
    config: Any, own: dict[str, Array], x: Array, positions: list[int], sees: Visible
) -> Array:
    width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    query, key, value = (
        x @ own[f"self_attn.{name}_proj.weight"].T + own.get(f"self_attn.{name}_proj.bias", 0.0)
        for name in "qkv"
    )
    length = len(x)
    mixed = np.zeros((length, heads * width))
    for head in range(heads):
        group = head * groups // heads
        places = [slice(number * width, (number + 1) * width) for number in (head, group)]
        q, k = (
            _rotated(_query_norm(config, own, name, part, place), positions, config.rope_theta)
            for name, part, place in zip("qk", (query, key), places, strict=True)
        )
        for slot in range(length):
            seen = [other for other in range(length) if other == slot or sees(slot, other)]
            scores = [q[slot] @ k[other] for other in seen]
            values = [value[other, places[1]] for other in seen]
            if config.attention_sink:
                scores.append(q[slot] @ own["self_attn.sink_key"][group])
                values.append(own["self_attn.sink_value"][group])
            scores = np.array(scores) / np.sqrt(width)
            cap = config.attn_logit_softcapping
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            shares = np.exp(scores - scores.max())
            mixed[slot, places[0]] = shares / shares.sum() @ np.array(values)
    return mixed @ own["self_attn.o_proj.weight"].T


def _query_norm(config: Any, own: dict[str, Array], name: str, x: Array, place: slice) -> Array:
    if not config.qk_layernorm:
        return x[:, place]
    weight = own[f"self_attn.{name}_norm.weight"]
    if config.qk_layernorm_scope == "full":
        return _norm(config, x, weight)[:, place]
    return _norm(config, x[:, place], weight)


def _rotated(x: Array, positions: list[int], base: float) -> Array:
    """Pairs (i, i + d / 2) as complex numbers, turned."""
    half = x.shape[1] // 2
    angles = np.outer(positions, base ** -(np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _mlp(config: Any, own: dict[str, Array], x: Array) -> Array:
    def project(name: str, x: Array) -> Array:
        return x @ own[f"mlp.{name}_proj.weight"].T + own.get(f"mlp.{name}_proj.bias", 0.0)

    if config.gated_mlp:
        gate = project("gate", x)
        inner = gate / (1 + np.exp(-gate)) * project("up", x)
    else:
        inner = np.maximum(project("up", x), 0.0) ** 2
    return project("down", inner)
