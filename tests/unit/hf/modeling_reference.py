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
        mix = _experts if "mlp.gate.weight" in own else _mlp
        x = x + config.residual_multiplier * mix(config, own, normed)
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


def _mlp(config: Any, own: dict[str, Array], x: Array, prefix: str = "mlp") -> Array:
    def project(name: str, x: Array) -> Array:
        bias = own.get(f"{prefix}.{name}_proj.bias", 0.0)
        return x @ own[f"{prefix}.{name}_proj.weight"].T + bias

    if config.gated_mlp:
        gate = project("gate", x)
        inner = gate / (1 + np.exp(-gate)) * project("up", x)
    else:
        inner = np.maximum(project("up", x), 0.0) ** 2
    return project("down", inner)


def _experts(config: Any, own: dict[str, Array], x: Array) -> Array:
    """Token by token; x [T, h] is one row."""
    logits = x @ own["mlp.gate.weight"].T
    takes = _taken_by_experts if config.moe_routing == "expert_choice" else _taken_by_tokens
    summed = np.zeros_like(x)
    for slot, experts in enumerate(takes(config, own, logits)):
        gates = _gates(config, logits[slot], experts)
        scales = config.moe_count_scales or [1.0] * (config.num_experts + 1)
        for expert, gate in zip(experts, gates, strict=True):
            out = _mlp(config, own, x[slot], f"mlp.experts.{expert}")
            summed[slot] += scales[len(experts)] * gate * out
        if config.shared_expert_intermediate_size:
            share = 1.0
            if config.shared_expert_gate:
                share = _sigmoid(own["mlp.shared_expert_gate.weight"][0] @ x[slot])
            summed[slot] += share * _mlp(config, own, x[slot], "mlp.shared_expert")
    return summed


def _taken_by_tokens(config: Any, own: dict[str, Array], logits: Array) -> list[list[int]]:
    scores = _sigmoid(logits) if config.moe_score_function == "sigmoid" else logits
    scores = scores + own.get("mlp.gate.expert_bias", 0.0)
    return [list(np.argsort(-row, kind="stable")[: config.num_experts_per_tok]) for row in scores]


def _taken_by_experts(config: Any, own: dict[str, Array], logits: Array) -> list[list[int]]:
    scores = _softmax(logits) if config.moe_pre_softmax else logits
    count = max(1, len(logits) * config.num_experts_per_tok // config.num_experts)
    best = [set(np.argsort(-column, kind="stable")[:count]) for column in scores.T]
    return [[e for e, slots in enumerate(best) if slot in slots] for slot in range(len(logits))]


def _gates(config: Any, logits: Array, experts: list[int]) -> Array:
    chosen = logits[experts]
    if config.moe_score_function == "sigmoid":
        is_one_of_many = config.moe_routing == "token_choice" and len(experts) == 1
        return _sigmoid(chosen) / (1.0 if is_one_of_many else _sigmoid(chosen).sum())
    if config.moe_pre_softmax:
        return _softmax(logits)[experts]
    return _softmax(chosen) if experts else chosen


def _softmax(x: Array) -> Array:
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
