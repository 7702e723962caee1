"""Experts in config.json: our `model.moe` on one side, Qwen3-MoE's keys or our own on the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.hf.layouts import Layout

# Field of model.moe -> key of our own layout, of what the function of the model depends on.
_KEYS = {
    "num_experts": "num_experts",
    "num_dense_layers": "num_dense_layers",
    "router_topk": "num_experts_per_tok",
    "routing": "moe_routing",
    "score_function": "moe_score_function",
    "pre_softmax": "moe_pre_softmax",
    "expert_bias": "moe_expert_bias",
    "count_scales": "moe_count_scales",
    "shared_expert_ffn_hidden_size": "shared_expert_intermediate_size",
    "shared_expert_gate": "shared_expert_gate",
}


def write_moe(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The keys of a model with experts."""
    moe = model.moe
    width = {"moe_intermediate_size": model.expert_ffn_size}
    if layout == "megatron_dlm":
        return {**{key: getattr(moe, name) for name, key in _KEYS.items()}, **width}
    assert layout == "qwen3_moe", layout
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk,
        **width,
        "norm_topk_prob": not moe.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.num_dense_layers)),
        "output_router_logits": False,
        "router_aux_loss_coef": moe.aux_loss_coeff,
    }


def read_moe(config: Mapping[str, Any], layout: Layout, path: Path) -> MoEConfig:
    """The section of a directory; ValueError naming `path` and the key."""
    # transformers 5 may write the second name.
    num_experts = config.get("num_experts", config.get("num_local_experts")) or 0
    if layout not in ("qwen3_moe", "megatron_dlm") or num_experts == 0:
        return MoEConfig()
    for key in ("moe_intermediate_size", "num_experts_per_tok"):
        if not isinstance(config.get(key), int):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; it must be a positive integer")
    width = config["moe_intermediate_size"]
    is_own_width = width != config.get("intermediate_size")
    values: dict[str, Any] = {
        "num_experts": num_experts,
        "ffn_hidden_size": width if is_own_width else None,
    }
    if layout == "qwen3_moe":
        values |= _read_qwen(config, path)
    else:
        values |= {
            name: _checked(config[key], name, key, path)
            for name, key in _KEYS.items()
            if key in config
        }
    try:
        return MoEConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(value: Any, name: str, key: str, path: Path) -> Any:
    """The value of a field, if it is of the field's type."""
    kind = get_type_hints(MoEConfig)[name]
    if get_origin(kind) is Literal:
        is_right, wanted = value in get_args(kind), "one of " + ", ".join(get_args(kind))
    elif get_origin(kind) is list:
        is_right = isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)
        wanted = "a list of numbers"
    else:
        is_right, wanted = type(value) is kind, f"of type {kind.__name__}"
    if not is_right:
        raise ValueError(f"{path}: {key} is {value!r}; it must be {wanted}")
    return value


def _read_qwen(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    dense = list(config.get("mlp_only_layers") or [])
    if sorted(dense) != list(range(len(dense))):
        raise ValueError(f"{path}: mlp_only_layers is {dense}; ours are the first ones, from 0 on")
    step = config.get("decoder_sparse_step", 1)
    if step != 1:
        raise ValueError(f"{path}: decoder_sparse_step is {step}; every layer of ours has experts")
    return {
        "router_topk": config["num_experts_per_tok"],
        "num_dense_layers": len(dense),
        # Without normalisation the gates are shares of all experts.
        "pre_softmax": not config.get("norm_topk_prob", False),
    }
