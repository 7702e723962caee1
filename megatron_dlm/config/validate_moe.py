"""Rules of mixture-of-experts models that span sections."""

from __future__ import annotations

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import RunConfig


def check_moe(config: RunConfig, world_size: int) -> None:
    """Refuse experts that the layout cannot split, and routing that the objective forbids."""
    model, parallel = config.model, config.parallel
    if not model.moe.is_moe:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            value = getattr(parallel, name)
            require(
                value == 1,
                f"parallel.{name} is {value}, but the model has no experts; set "
                "model.moe.num_experts or remove it",
            )
        return
    _check_split(model, parallel)
    _check_ranks(parallel, world_size)
    require(
        not model.mlp_bias,
        "model.mlp_bias is true, but experts have no biases (model.moe.num_experts "
        f"{model.moe.num_experts}); remove it",
    )
    require(
        model.moe.seq_aux_loss_coeff == 0 or not config.data.resets_attention,
        f"model.moe.seq_aux_loss_coeff {model.moe.seq_aux_loss_coeff} is per sequence, but where "
        f"attention stays inside documents (data.packing {config.data.packing}, "
        "data.reset_attention_mask) the rows of a micro-batch are one sequence; use aux_loss_coeff",
    )
    _refuse_ignored(config, ("moe_enable_routing_replay", "moe_per_layer_logging"))
    if model.moe.routing == "expert_choice":
        _check_expert_choice(config)


def _check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    parts = {
        "model.moe.num_experts": model.moe.num_experts,
        "model.moe.ffn_hidden_size": model.expert_ffn_size,
        "model.moe.shared_expert_ffn_hidden_size": model.moe.shared_expert_ffn_hidden_size,
    }
    axes = (
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "tensor_model_parallel_size",
    )
    for (name, value), axis in zip(parts.items(), axes, strict=True):
        size = getattr(parallel, axis)
        require(value % size == 0, f"{name} {value} is not a multiple of parallel.{axis} {size}")


def _check_ranks(parallel: ParallelConfig, world_size: int) -> None:
    tensor_size = parallel.tensor_model_parallel_size
    require(
        tensor_size == 1 or parallel.sequence_parallel,
        f"parallel.tensor_model_parallel_size is {tensor_size}: experts would see every token "
        f"{tensor_size} times; set parallel.sequence_parallel true",
    )
    expert_size = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    stages = parallel.pipeline_model_parallel_size
    require(
        world_size % (expert_size * stages) == 0,
        f"{world_size} ranks are not a multiple of {expert_size * stages}, which is "
        f"parallel.expert_model_parallel_size {parallel.expert_model_parallel_size} * "
        f"expert_tensor_parallel_size {parallel.expert_tensor_parallel_size} * "
        f"pipeline_model_parallel_size {stages}",
    )


def _check_expert_choice(config: RunConfig) -> None:
    kind, data = config.objective.kind, config.data
    require(
        kind not in ("autoregressive", "block"),
        f"model.moe.routing expert_choice cannot train objective.kind {kind}: whether an expert "
        "takes a token depends on later ones, which the model must predict; use token_choice",
    )
    require(
        not data.resets_attention,
        f"model.moe.routing expert_choice lets the documents of a window compete for experts, but "
        f"attention stays inside them (data.packing {data.packing}, data.reset_attention_mask); "
        "use token_choice, or data.packing concat without it",
    )
    _refuse_ignored(config, ("moe_router_", "moe_input_jitter_eps"))


def _refuse_ignored(config: RunConfig, prefixes: tuple[str, ...]) -> None:
    ignored = [name for name in config.model.megatron if name.startswith(prefixes)]
    require(
        not ignored,
        f"model.megatron.{', '.join(ignored)} has no effect with model.moe.routing "
        f"{config.model.moe.routing}; remove it",
    )
