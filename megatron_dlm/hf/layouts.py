"""Which layout a model is written in: stock code where it computes the same, else ours.

What no layout can say is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.mapping import has_query_bias

Layout = Literal["qwen3", "qwen3_moe", "qwen2", "llama", "megatron_dlm", "megadlms"]

STOCK: tuple[Layout, ...] = ("qwen3", "qwen3_moe", "qwen2", "llama")
"""Read by classes of transformers."""
ARCHITECTURES: dict[str, Layout] = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MegatronDLMForCausalLM": "megatron_dlm",
    "DiffLM": "megadlms",
}
# Options of the model section that only our own code knows, under their own names; Llama knows the
# first, too.
OPTIONS = (
    "mlp_bias",
    "qk_layernorm_scope",
    "attn_logit_softcapping",
    "attention_sink",
    "layernorm_zero_centered_gamma",
    "residual_multiplier",
    "output_multiplier",
)
# Options of Megatron Core that say how the model is computed, not what.
_HOW_NOT_WHAT = (
    "apply_query_key_layer_scaling",
    "apply_rope_fusion",
    "attention_backend",
    "attention_softmax_in_fp32",
    "batch_invariant_mode",
    "cpu_offloading",
    "cross_entropy",
    "cuda_graph",
    "deterministic_mode",
    "disable_",
    "distribute_saved_activations",
    "enable_cuda_graph",
    "fp32_residual_connection",
    "fp8",
    "fused_",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "memory_efficient_layer_norm",
    "moe_deepep_num_sms",
    "moe_per_layer_logging",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_shared_expert_overlap",
    "overlap_",
    "persist_layer_norm",
    "recompute_modules",
    "tp_comm_",
    "tp_only_amax_red",
    "use_",
)


def check_expressible(model: ModelConfig) -> None:
    """Refuse, by name, options of which no exported model knows."""
    for name, value in model.megatron.items():
        if name == "add_qkv_bias" or name.startswith(_HOW_NOT_WHAT) or value in (None, False):
            continue
        raise ValueError(
            f"model.megatron.{name} is {value}, which may change what the model computes and which "
            "Hugging Face's format cannot express here; train without it to export"
        )
    if model.moe.is_moe:
        _check_routing(model.moe)


def _check_routing(moe: MoEConfig) -> None:
    """Refuse experts for a token that depend on the other samples of its micro-batch."""
    if moe.routing == "expert_choice" and moe.choice_scope == "micro_batch":
        raise ValueError(
            "model.moe.choice_scope is micro_batch: what a token passes depends on the other "
            "samples of its micro-batch, which no model has where it is used; train with sequence"
        )
    factor = moe.capacity_factor
    if factor is not None and factor * moe.router_topk < moe.num_experts:
        raise ValueError(
            f"model.moe.capacity_factor is {factor:g}: which tokens are dropped depends on the "
            "other samples of their micro-batch, which no model has where it is used; train "
            "without it"
        )


def choose_layout(model: ModelConfig, objective: ObjectiveConfig, wanted: str) -> Layout:
    """The layout to write: auto takes stock code where it computes the same, else ours.

    Raises ValueError naming what keeps the model out of the wanted layout.
    """
    check_expressible(model)
    if wanted == "megatron_dlm":
        return "megatron_dlm"
    options = _options_that_are_on(model)
    has_bias, gated = has_query_bias(model), model.activation == "swiglu"
    if wanted == "megadlms":
        kind = objective.kind
        obstacles = {
            f"objective.kind {kind} (it must be masked)": kind != "masked",
            f"model.activation {model.activation} (it must be swiglu)": not gated,
            "model.qk_layernorm false (it must be true)": not model.qk_layernorm,
            "model.megatron.add_qkv_bias true (it must be false)": has_bias,
            "model.rope_scaling_factor (it must be null)": model.rope_scaling_factor is not None,
            f"model.moe.num_experts {model.moe.num_experts} (it must be 0)": model.moe.is_moe,
            **{f"model.{name} {value}": True for name, value in options.items()},
        }
        for obstacle, stands in obstacles.items():
            if stands:
                raise ValueError(f"layout megadlms cannot express {obstacle}; use layout auto")
        return "megadlms"
    if objective.kind != "autoregressive" or not gated or options.keys() - {"mlp_bias"}:
        return "megatron_dlm"
    if model.moe.is_moe:
        return "qwen3_moe" if _fits_qwen3_moe(model) else "megatron_dlm"
    if model.mlp_bias:
        return _llama(model) if not (model.qk_layernorm or has_bias) else "megatron_dlm"
    if model.qk_layernorm:
        return "megatron_dlm" if has_bias else "qwen3"
    if has_bias:
        return "qwen2" if model.kv_channels is None else "megatron_dlm"
    return _llama(model)


def _fits_qwen3_moe(model: ModelConfig) -> bool:
    """Experts of Qwen3-MoE: softmax gates of the best ones, and nothing besides."""
    moe = model.moe
    is_plain = moe.routing == "token_choice" and moe.score_function == "softmax"
    has_more = moe.expert_bias or moe.shared_expert_ffn_hidden_size > 0
    has_bias = model.mlp_bias or has_query_bias(model)
    return is_plain and model.qk_layernorm and not (has_more or has_bias)


def _llama(model: ModelConfig) -> Layout:
    # transformers 5 insists on this although head_dim is given.
    is_divisible = model.hidden_size % model.num_attention_heads == 0
    return "llama" if is_divisible else "megatron_dlm"


def _options_that_are_on(model: ModelConfig) -> dict[str, Any]:
    """The options that are on."""
    values = {name: getattr(model, name) for name in OPTIONS}
    return {
        name: value
        for name, value in values.items()
        if value != ModelConfig.__dataclass_fields__[name].default
    }
