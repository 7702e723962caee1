"""Mixture of experts in Megatron Core's words: its options, and the modules of an MoE layer."""

from __future__ import annotations

from megatron_dlm.config.architecture import ModelConfig


def moe_options(model: ModelConfig, *, has_engine: bool) -> dict[str, object]:
    """Fields of TransformerConfig that an MoE model sets; none of a dense one."""
    moe = model.moe
    if not moe.is_moe:
        return {}
    losses = {
        "aux_loss": moe.aux_loss_coeff,
        "seq_aux_loss": moe.seq_aux_loss_coeff,
        "global_aux_loss": moe.global_aux_loss_coeff,
    }
    balancing = {name: weight for name, weight in losses.items() if weight > 0}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_layer_freq": [int(n >= moe.num_dense_layers) for n in range(model.num_layers)],
        "moe_router_topk": moe.router_topk,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": list(balancing) or "none",
        "moe_aux_loss_coeff": list(balancing.values()) or 0.0,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": moe.drop_policy,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_token_dispatcher_type": moe.token_dispatcher,
        "moe_grouped_gemm": has_engine,
        "moe_permute_fusion": has_engine,
    }
