"""Rules of context parallelism: lengths that divide, heads that divide, attention that can run."""

from __future__ import annotations

import math

from megatron_dlm.config.checks import require
from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.config.schema import RunConfig


def check_context(config: RunConfig) -> None:
    """Refuse what cannot share its sequences over parallel.context_parallel_size ranks."""
    if config.parallel.context_parallel_size == 1:
        return
    _check_lengths(config)
    if config.parallel.context_parallel_comm == "a2a":
        _check_heads(config)
    if config.parallel.context_parallel_comm == "p2p":
        _check_ring(config)
    _check_documents(config)


def _check_lengths(config: RunConfig) -> None:
    parallel, objective = config.parallel, config.objective
    size = parallel.context_parallel_size
    multiple, reason = 2 * size, f"2 * parallel.context_parallel_size {size}"
    if parallel.sequence_parallel:
        tensor_size = parallel.tensor_model_parallel_size
        multiple = math.lcm(multiple, size * tensor_size)
        reason = (
            f"{multiple}, which parallel.context_parallel_size {size} with "
            f"parallel.sequence_parallel over {tensor_size} ranks needs"
        )
    lengths = {"model.seq_length": config.model.seq_length}
    if objective.variable_length_probability > 0:
        lengths["objective.variable_length_multiple"] = objective.variable_length_multiple
    for name, length in lengths.items():
        require(length % multiple == 0, f"{name} {length} is not a multiple of {reason}")


def _check_heads(config: RunConfig) -> None:
    parallel, model = config.parallel, config.model
    size, tensor_size = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    for name, number in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.query_groups),
    ):
        require(
            number % (size * tensor_size) == 0,
            f"parallel.context_parallel_comm a2a gives every rank some heads: {name} {number} is "
            f"not a multiple of parallel.tensor_model_parallel_size {tensor_size} * "
            f"parallel.context_parallel_size {size}; use all_gather",
        )


def _check_ring(config: RunConfig) -> None:
    model, objective = config.model, config.objective
    simple = (AttentionPattern.CAUSAL, AttentionPattern.BIDIRECTIONAL)
    ours = {
        f"the attention of objective.kind {objective.kind} (blocks, prompts, infilling or "
        "annealing)": objective.attention not in simple,
        "model.attn_logit_softcapping": model.attn_logit_softcapping is not None,
        "model.attention_sink": model.attention_sink,
        "model.transformer_impl local": model.transformer_impl == "local",
        "model.attention_backend local": model.attention_backend == "local",
        "train.device cpu": config.train.device == "cpu",
    }
    for name, is_ours in ours.items():
        require(
            not is_ours,
            f"parallel.context_parallel_comm p2p is Transformer Engine's attention, which does not "
            f"run with {name}; use auto, all_gather or a2a",
        )


def _check_documents(config: RunConfig) -> None:
    model = config.model
    is_ours = config.train.device == "cpu" or "local" in (
        model.transformer_impl,
        model.attention_backend,
    )
    require(
        is_ours or not config.data.resets_attention,
        f"attention inside documents (data.packing {config.data.packing}, "
        "data.reset_attention_mask) with parallel.context_parallel_size "
        f"{config.parallel.context_parallel_size} needs our own attention: Transformer Engine "
        "would want documents of equal parts; set model.attention_backend local",
    )
