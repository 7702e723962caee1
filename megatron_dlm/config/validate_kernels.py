"""Rules about kernels: attention, recompute, FP8 shapes, offload. Each failure is one line.

What only the machine can say (is there a GPU, which one) is checked where the model is built.
"""

from __future__ import annotations

from megatron_dlm.config.checks import require
from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.config.schema import RunConfig

_FUSED_PATTERNS = (AttentionPattern.CAUSAL, AttentionPattern.BIDIRECTIONAL)


def check_kernels(config: RunConfig) -> None:
    """Refuse what no machine could run."""
    _check_attention_backend(config)
    _check_offload(config)
    _check_tensor_overlap(config)
    if config.train.precision == "fp8":
        _check_fp8(config)


def _check_attention_backend(config: RunConfig) -> None:
    model, backend = config.model, config.model.attention_backend
    if backend in ("auto", "local"):
        return
    needs = {
        "model.attn_logit_softcapping": model.attn_logit_softcapping is not None,
        "model.attention_sink": model.attention_sink,
        f"the attention of objective.kind {config.objective.kind}": (
            config.objective.attention not in _FUSED_PATTERNS
        ),
    }
    for name, is_ours in needs.items():
        require(
            not is_ours,
            f"model.attention_backend {backend} cannot compute {name}; use auto",
        )


def _check_offload(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    layers = parallel.activation_offload_layers
    require(
        layers == 0 or layers < model.num_layers,
        f"parallel.activation_offload_layers {layers} must be below model.num_layers "
        f"{model.num_layers}: the last layer is needed at once",
    )
    require(
        layers == 0 or model.recompute_granularity == "none",
        f"parallel.activation_offload_layers {layers} and model.recompute_granularity "
        f"{model.recompute_granularity} both save activations; use one of them",
    )
    share = parallel.optimizer_cpu_offload_fraction
    require(
        share == 0 or config.optimizer.kind == "adamw",
        f"parallel.optimizer_cpu_offload_fraction {share} needs optimizer.kind adamw; it is "
        f"{config.optimizer.kind}",
    )
    require(
        share == 0 or config.train.device != "cpu",
        f"parallel.optimizer_cpu_offload_fraction is {share}, but train.device is cpu: the "
        "optimizer is there already",
    )


def _check_tensor_overlap(config: RunConfig) -> None:
    """Its buffers have one shape for the whole run."""
    if not config.parallel.tp_comm_overlap:
        return
    varies = {
        "objective.variable_length_probability": config.objective.variable_length_probability > 0,
        "train.precision fp8": config.train.precision == "fp8",
    }
    for name, is_asked in varies.items():
        require(
            not is_asked,
            f"parallel.tp_comm_overlap has buffers of one shape and of bf16, which {name} does not "
            "keep to; use one of them",
        )


def _check_fp8(config: RunConfig) -> None:
    require(
        config.model.transformer_impl != "local" and config.train.device != "cpu",
        "train.precision fp8 needs Transformer Engine on a GPU, but model.transformer_impl is "
        f"{config.model.transformer_impl} and train.device is {config.train.device}; use bf16, or "
        "auto for both",
    )
    model, recipe = config.model, config.fp8.recipe
    freed = {"layernorm", "moe_act"} & set(model.recompute_modules)
    require(
        recipe != "delayed" or model.recompute_granularity != "selective" or not freed,
        f"fp8.recipe delayed cannot recompute {', '.join(sorted(freed))} "
        "(model.recompute_modules); use recipe tensorwise",
    )
    multiple = config.fp8.alignment
    for name, value in _fp8_sizes(config).items():
        require(
            value % multiple == 0,
            f"fp8.recipe {recipe} multiplies matrices whose sides are multiples of "
            f"{multiple}; {name} is {value}",
        )


def _fp8_sizes(config: RunConfig) -> dict[str, int]:
    """Sides of the matrices of the layers on one rank, by how they come about."""
    model, parallel = config.model, config.parallel
    tensor, experts = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    sizes = {
        "model.hidden_size": model.hidden_size,
        "attention width (num_attention_heads * head width / TP)": (
            model.num_attention_heads * model.head_size // tensor
        ),
        "query, key and value width ((heads + 2 * groups) * head width / TP)": (
            (model.num_attention_heads + 2 * model.query_groups) * model.head_size // tensor
        ),
        "tokens of one pass (micro_batch_size * sequence / CP, / TP with SP)": _pass_tokens(config),
    }
    if model.num_moe_layers < model.num_layers:
        sizes["model.ffn_hidden_size / TP"] = model.ffn_size // tensor
    if model.moe.is_moe:
        sizes["model.moe.ffn_hidden_size / ETP"] = model.expert_ffn_size // experts
    return sizes


def _pass_tokens(config: RunConfig) -> int:
    parallel, objective = config.parallel, config.objective
    length = config.model.seq_length
    if objective.variable_length_probability > 0:
        length = objective.variable_length_multiple
    if objective.attention is AttentionPattern.BLOCK:
        length *= 2
    shared = parallel.context_parallel_size
    if parallel.sequence_parallel:
        shared *= parallel.tensor_model_parallel_size
    return config.train.micro_batch_size * length // shared
