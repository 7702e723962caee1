"""Megatron's data-parallel wrapper and distributed optimizer around our model chunks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.checkpoint.state import optimizer_parts
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.build import LanguageModel
from megatron_dlm.models.parametrization import ParameterKind, kind_of, update_settings
from megatron_dlm.ops.laprop import LaProp
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.training.bucket_padding import keep_bucket_padding

_ONE_RANK = ParallelConfig()


def wrap_data_parallel(
    chunks: Sequence[LanguageModel], config: ParallelConfig, parallel: ParallelContext
) -> list[DistributedDataParallel]:
    """Give every chunk gradient buffers that are summed (never averaged) over the DP ranks.

    Megatron then divides once by the global token count, which is the only normalisation that is
    the same for every split of the batch.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.grad_reduce_in_fp32,
        bucket_size=config.bucket_size_parameters,
        pad_buckets_for_high_nccl_busbw=config.pad_buckets_for_high_nccl_busbw,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            # Only the first chunk's buckets can be reduced while backward still runs elsewhere.
            disable_bucketing=number > 0,
            pg_collection=parallel.groups,
        )
        for number, chunk in enumerate(chunks)
    ]
    shared = chunks[0].config  # one object for all chunks
    shared.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        no_sync = [ddp.no_sync for ddp in wrapped]
        shared.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    overlap_param_gather: bool,
    parallel_config: ParallelConfig = _ONE_RANK,
) -> MegatronOptimizer:
    """AdamW or LaProp whose state is sharded over the DP ranks, one group per way of learning.

    parallel_config says which share of the state lives on the host. A parameter whose kind is
    unknown fails an assertion (see `kind_of`).
    """
    model_config = chunks[0].module.config
    optimizer = get_megatron_optimizer(
        megatron_settings(
            config,
            model_config,
            overlap_param_gather=overlap_param_gather,
            offload_fraction=parallel_config.optimizer_cpu_offload_fraction,
        ),
        list(chunks),
        config_overrides=_group_overrides(
            config, model_config.hidden_size, model_config.num_layers
        ),
    )
    for part in optimizer_parts(optimizer):
        keep_bucket_padding(part)
        if config.kind == "laprop":
            # Megatron Core makes Adam only; its groups of shards and its states serve LaProp too.
            part.optimizer = LaProp.taking_over(part.optimizer)
        # Without Transformer Engine and Apex this is PyTorch's, by default not fused.
        elif isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def megatron_settings(
    config: OptimizerConfig,
    model: TransformerConfig,
    *,
    overlap_param_gather: bool,
    offload_fraction: float,
) -> MegatronOptimizerConfig:
    """The same optimizer in Megatron Core's words."""
    assert not config.adam_beta2_by_batch, "call OptimizerConfig.for_batch first"
    offloads = offload_fraction > 0
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        # The norm is always computed: it is logged and guards against NaN.
        clip_grad=config.clip_grad or sys.float_info.max,
        bf16=model.bf16,
        params_dtype=model.params_dtype,
        fp8_recipe=model.fp8_recipe if model.fp8 else None,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap_param_gather,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=offload_fraction,
        # The optimizer on both devices keeps its fp32 weights itself, as this one does.
        use_precision_aware_optimizer=offloads,
    )


def _group_overrides(
    config: OptimizerConfig, hidden_size: int, num_layers: int
) -> dict[ParamKey, dict[str, float]]:
    """What the groups of Megatron Core's optimizer get besides its defaults.

    Its own scheduler would multiply by wd_mult and lr_mult; we do it, here and in
    `set_learning_rate`. Kinds that learn alike share a group.
    """
    overrides = {}
    for kind in ParameterKind:
        settings = update_settings(kind, config, hidden_size=hidden_size, num_layers=num_layers)
        key = ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                kind.name, lambda _, name, kind=kind: kind_of(name) is kind
            )
        )
        overrides[key] = {
            "lr_mult": settings.lr_scale,
            "wd_mult": settings.weight_decay_scale,
            "weight_decay": config.weight_decay * settings.weight_decay_scale,
            "eps": settings.epsilon,
        }
    return overrides


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use this learning rate of the run for the next update; every group takes its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]


@contextlib.contextmanager
def parameters_gathered(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, all parameters are whole: with overlap_param_gather they otherwise arrive lazily."""
    overlapped = chunks[0].ddp_config.overlap_param_gather
    if overlapped:
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
    try:
        with torch.no_grad():
            yield
    finally:
        if overlapped:
            for chunk in chunks:
                chunk.enable_forward_pre_hook()
