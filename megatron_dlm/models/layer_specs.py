"""Which modules a transformer layer is made of: a value, not a branch in the model."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.models.attention import ScaledDotProductAttention
from megatron_dlm.models.norms import RMSNorm

_MASK_TYPES = {
    AttentionPattern.CAUSAL: AttnMaskType.causal,
    AttentionPattern.BIDIRECTIONAL: AttnMaskType.no_mask,
}


def block_spec(
    config: TransformerConfig, objective: ObjectiveConfig, *, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = (
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm),
            TENorm,
        )
    else:
        layer, norm = _local_layer(config), RMSNorm
    layer.submodules.self_attention.params["attn_mask_type"] = _MASK_TYPES[objective.attention]
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
