"""One table of settings: our model section on one side, Hugging Face's config.json on the other.

What one side cannot say is refused by name, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.layouts import ARCHITECTURES, OPTIONS, STOCK, Layout
from megatron_dlm.hf.mapping import has_query_bias
from megatron_dlm.hf.moe_settings import read_moe, write_moe
from megatron_dlm.hf.objective_settings import read_objective, write_objective

MODELING, CONFIGURATION = "modeling_megatron_dlm", "configuration_megatron_dlm"
_AUTO_MAPS: dict[Layout, dict[str, str]] = {
    "megatron_dlm": {
        "AutoConfig": f"{CONFIGURATION}.MegatronDLMConfig",
        "AutoModel": f"{MODELING}.MegatronDLMModel",
        "AutoModelForCausalLM": f"{MODELING}.MegatronDLMForCausalLM",
    },
    "megadlms": {
        "AutoConfig": "configuration_dlm.DLMConfig",
        "AutoModelForCausalLM": "modeling_dlm.DiffLM",
    },
}
# activation -> (hidden_act, gated_mlp)
_ACTIVATIONS = {"swiglu": ("silu", True), "squared_relu": ("relu2", False), "gelu": ("gelu", False)}
_QWEN3: tuple[Layout, ...] = ("qwen3", "qwen3_moe")
# Llama 3.1's scaling of the rotary embedding, as Megatron Core has it: only its factor is free.
_ROPE_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class SpecialIds:
    """Ids that config.json names; None where there is none."""

    mask: int | None = None
    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    silent: tuple[int, ...] = ()
    """Ids that stand for no text and must not be generated."""


@dataclass(frozen=True)
class Described:
    """What a config.json says."""

    layout: Layout
    model: ModelConfig
    objective: ObjectiveConfig
    ids: SpecialIds


def write_config(
    model: ModelConfig, objective: ObjectiveConfig, layout: Layout, *, ids: SpecialIds, dtype: str
) -> dict[str, Any]:
    """config.json of a model; readable by transformers 4.51 to 5."""
    hidden_act, gated = _ACTIVATIONS[model.activation]
    (architecture,) = (name for name, known in ARCHITECTURES.items() if known == layout)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "auto_map": _AUTO_MAPS.get(layout),
        "model_type": None if layout == "megadlms" else layout,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "hidden_act": hidden_act,
        "rms_norm_eps": model.normalization_epsilon,
        "rope_theta": float(model.rotary_base),
        "max_position_embeddings": model.seq_length,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
        "pad_token_id": ids.pad,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "use_cache": layout in STOCK,
    }
    config = {name: value for name, value in config.items() if value is not None}
    # Said even where it is null: defaults are other values or warnings.
    config |= {"use_sliding_window": False, "sliding_window": None}
    if model.rope_scaling_factor is not None:
        config["rope_scaling"] = {**_ROPE_SCALING, "factor": float(model.rope_scaling_factor)}
    elif layout == "megadlms":
        config["rope_scaling"] = None
    if layout in (*_QWEN3, "llama", "megatron_dlm"):
        config["attention_bias"] = has_query_bias(model)
    if layout == "llama":
        config["mlp_bias"] = model.mlp_bias
    if layout == "megadlms":
        config |= {"attn_mask_type": "bidirectional", "mask_token_id": ids.mask}
    if model.moe.is_moe:
        config |= write_moe(model, layout)
    if layout == "megatron_dlm":
        config |= write_objective(objective)
        config |= {
            "mask_token_id": ids.mask,
            "silent_token_ids": list(ids.silent),
            "qk_layernorm": model.qk_layernorm,
            "gated_mlp": gated,
            **{name: getattr(model, name) for name in OPTIONS},
        }
    return config


def read_config(config: Mapping[str, Any], path: Path) -> Described:
    """What a config.json says, in our words.

    Raises ValueError naming `path` and the key for an architecture or a setting we do not have.
    """
    layout = _layout_of(config, path)
    _refuse_foreign_settings(config, layout, path)

    def count(name: str) -> int:
        return _count(config, name, path)

    hidden_size, num_heads = count("hidden_size"), count("num_attention_heads")
    # Qwen3's own default is 128, not the quotient.
    has_head_dim = config.get("head_dim") is not None
    default_head = 128 if layout == "qwen3" else hidden_size // num_heads
    head_dim = count("head_dim") if has_head_dim else default_head
    has_bias = layout == "qwen2" or (layout == "megatron_dlm" and config.get("attention_bias"))
    qk_layernorm = layout in (*_QWEN3, "megadlms")
    if layout == "megatron_dlm":
        qk_layernorm = bool(config.get("qk_layernorm", True))
    ids = _ids(config)
    model = _model_config(
        path,
        num_layers=count("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_query_groups=count("num_key_value_heads"),
        kv_channels=None if head_dim * num_heads == hidden_size else head_dim,
        ffn_hidden_size=count("intermediate_size"),
        activation=_activation(config, path),
        qk_layernorm=qk_layernorm,
        normalization_epsilon=_number(config, "rms_norm_eps", path),
        rotary_base=_rotary_base(config, path),
        rope_scaling_factor=_rope_scaling_factor(config, path),
        seq_length=count("max_position_embeddings"),
        vocab_size=count("vocab_size"),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        init_method_std=config.get("initializer_range") or 0.02,
        megatron={"add_qkv_bias": True} if has_bias else {},
        moe=read_moe(config, layout, path),
        **_read_options(config, layout),
    )
    return Described(layout, model, _objective(config, layout, path, ids), ids)


def _model_config(path: Path, **values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_options(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    known = {"megatron_dlm": OPTIONS, "llama": ("mlp_bias",)}.get(layout, ())
    return {name: config[name] for name in known if name in config}


def _count(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = _number(config, name, path)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}; it must be a positive integer")
    return value


def _number(config: Mapping[str, Any], name: str, path: Path) -> Any:
    value = config.get(name)
    if value is None:
        raise ValueError(f"{path}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: {name} is {value!r}; it must be a number")
    return value


def _layout_of(config: Mapping[str, Any], path: Path) -> Layout:
    architectures = config.get("architectures") or []
    for architecture in architectures:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    shown = ", ".join(architectures) or config.get("model_type") or "not named"
    raise ValueError(
        f"{path}: the architecture {shown} is not known (have: {', '.join(ARCHITECTURES)})"
    )


def _refuse_foreign_settings(config: Mapping[str, Any], layout: Layout, path: Path) -> None:
    foreign = {
        "mlp_bias": layout in (*_QWEN3, "qwen2", "megadlms") and config.get("mlp_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
        "pretraining_tp": (config.get("pretraining_tp") or 1) != 1,
        "quantization_config": config.get("quantization_config"),
        "attention_bias": layout in (*_QWEN3, "llama") and config.get("attention_bias"),
        "partial_rotary_factor": (config.get("partial_rotary_factor") or 1.0) != 1.0,
    }
    for name, is_set in foreign.items():
        if is_set:
            raise ValueError(f"{path}: {name} is {config[name]}, which our model does not have")
    layer_types = set(config.get("layer_types") or [])
    if layer_types - {"full_attention"}:
        raise ValueError(f"{path}: layer_types has {sorted(layer_types)}; only full_attention")


def _rotary_base(config: Mapping[str, Any], path: Path) -> int:
    default = config.get("rope_theta", 10_000.0)
    base = _number({"rope_theta": _rope(config).get("rope_theta", default)}, "rope_theta", path)
    if base != int(base):
        raise ValueError(f"{path}: rope_theta is {base}; our model.rotary_base is a whole number")
    return int(base)


def _rope_scaling_factor(config: Mapping[str, Any], path: Path) -> float | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path}: rope_type {kind} scales the rotary embedding as our model cannot; only llama3"
        )
    for name, value in _ROPE_SCALING.items():
        if name != "rope_type" and rope.get(name) != value:
            raise ValueError(f"{path}: {name} of rope_type llama3 is {rope.get(name)}, not {value}")
    return float(_number(rope, "factor", path))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where transformers 5 and 4 keep the settings of the rotary embedding."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _activation(config: Mapping[str, Any], path: Path) -> Any:
    said = (config.get("hidden_act"), config.get("gated_mlp", True))
    for activation, spelling in _ACTIVATIONS.items():
        if said == spelling:
            return activation
    raise ValueError(f"{path}: hidden_act {said[0]} (gated: {said[1]}) is not one of ours")


def _objective(
    config: Mapping[str, Any], layout: Layout, path: Path, ids: SpecialIds
) -> ObjectiveConfig:
    if layout == "megadlms":
        pattern = config.get("attn_mask_type", "bidirectional")
        if pattern != "bidirectional":
            raise ValueError(f"{path}: attn_mask_type is {pattern}; DiffLM is bidirectional")
        return ObjectiveConfig(kind="masked", mask_token_id=ids.mask)
    return read_objective(config, path, mask_token_id=ids.mask)


def _ids(config: Mapping[str, Any]) -> SpecialIds:
    def first(name: str) -> int | None:
        value: Any = config.get(name)
        # Llama 3 lists several ends; the first is that of a document.
        token: int | None = value[0] if isinstance(value, list) and value else value
        return token

    return SpecialIds(
        mask=first("mask_token_id"),
        pad=first("pad_token_id"),
        bos=first("bos_token_id"),
        eos=first("eos_token_id"),
        silent=tuple(config.get("silent_token_ids") or ()),
    )
