"""Which modules a transformer layer is made of: a value, not a branch in the model."""

from __future__ import annotations

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.distributed import ProcessGroup

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.models.attention import AttentionOptions, CoreAttention
from megatron_dlm.models.branches import UnbiasedSelfAttention, scaled_addition
from megatron_dlm.models.moe import adapt_moe_layer
from megatron_dlm.models.norms import FullWidthRMSNorm, RMSNorm

_MASK_TYPES = {
    AttentionPattern.CAUSAL: AttnMaskType.causal,
    AttentionPattern.BIDIRECTIONAL: AttnMaskType.no_mask,
    # Read by Transformer Engine only, which never computes these.
    AttentionPattern.ARBITRARY: AttnMaskType.arbitrary,
    AttentionPattern.BLOCK: AttnMaskType.arbitrary,
}


def block_spec(
    config: TransformerConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    tp_group: ProcessGroup,
    virtual_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm."""
    has_engine = config.transformer_impl == "transformer_engine"
    norm: type = RMSNorm
    if has_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=virtual_stage))
    layers = [
        _layer(config, model, objective, tp_group=tp_group, has_experts=has_experts)
        for has_experts in (n >= model.num_layers - model.num_moe_layers for n in numbers)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layer(
    config: TransformerConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    tp_group: ProcessGroup,
    has_experts: bool,
) -> ModuleSpec:
    num_experts = model.moe.num_experts if has_experts else None
    has_engine = config.transformer_impl == "transformer_engine"
    if has_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=has_experts,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        layer = _local_layer(config, num_experts)
    parts = layer.submodules
    if has_experts:
        adapt_moe_layer(layer, model.moe)
    attention = parts.self_attention
    attention.params["attn_mask_type"] = _MASK_TYPES[objective.attention]
    options = _attention_options(model, objective)
    is_ours = config.attention_backend is AttnBackend.local
    if not (has_engine and options.is_fused) or is_ours:
        attention.submodules.core_attention = partial(CoreAttention, options=options)
    if model.qk_layernorm and model.qk_layernorm_scope == "full":
        _normalise_full_width(attention, model, tp_group)
    if model.mlp_bias:
        attention.module = UnbiasedSelfAttention
    if model.residual_multiplier != 1.0:
        parts.self_attn_bda = parts.mlp_bda = scaled_addition(model.residual_multiplier)
    return layer


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if num_experts is not None:
        # No matrix behind this norm is its own; Transformer Engine keeps it by this name too.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _attention_options(model: ModelConfig, objective: ObjectiveConfig) -> AttentionOptions:
    is_blocks = objective.attention is AttentionPattern.BLOCK
    return AttentionOptions(
        pattern=objective.attention,
        block_size=objective.block_size if is_blocks else None,
        soft_cap=model.attn_logit_softcapping,
        has_sink=model.attention_sink,
    )


def _normalise_full_width(
    attention: ModuleSpec, model: ModelConfig, tp_group: ProcessGroup
) -> None:
    for name, num_heads in (
        ("q_layernorm", model.num_attention_heads),
        ("k_layernorm", model.query_groups),
    ):
        norm = ModuleSpec(FullWidthRMSNorm, {"num_heads": num_heads, "tp_group": tp_group})
        setattr(attention.submodules, name, norm)
