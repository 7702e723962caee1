"""Mixture of experts in Megatron Core's words: its options, and who routes."""

from __future__ import annotations

from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.models.moe_routers import ExpertChoiceRouter, TokenChoiceRouter


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
    options = {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        # A list, so that checkpoints number the layers whether or not some of them are dense.
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
    return options if moe.routing == "token_choice" else options | _EXPERT_CHOICE


_EXPERT_CHOICE: dict[str, object] = {
    # Our router reads MoEConfig; Megatron Core refuses top-1 without this.
    "moe_router_pre_softmax": True,
    # Nothing is dropped by it: with a capacity the all-to-all dispatcher counts the pairs of tokens
    # and experts, otherwise it takes them to be top-k per token, which holds for no slice.
    "moe_expert_capacity_factor": 1.0,
}


def adapt_moe_layer(layer: ModuleSpec, moe: MoEConfig) -> None:
    """Put the router of these settings into the spec of an MoE layer, and experts that are reduced
    over the right ranks."""
    parts = layer.submodules.mlp.submodules
    router = TokenChoiceRouter if moe.routing == "token_choice" else ExpertChoiceRouter
    parts.router = partial(router, settings=moe)
    parts.experts.module = _reduced_over_their_ranks(parts.experts.module)


def _reduced_over_their_ranks(experts: type[nn.Module]) -> type[nn.Module]:
    """`experts` whose gradients are summed over the ranks that hold the same experts.

    Megatron Core does so only where EP > 1. Without it the TP ranks hold whole experts that see
    different tokens (SP), and each would keep its own gradient.
    """

    class Experts(experts):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            for parameter in self.parameters():
                parameter.allreduce = False  # "expert parallel", in Megatron Core's words

    Experts.__name__ = experts.__name__
    return Experts
