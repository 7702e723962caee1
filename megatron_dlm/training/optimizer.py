"""Megatron's data-parallel wrapper and distributed AdamW around our model chunks."""

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
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_dlm.checkpoint.state import optimizer_parts
from megatron_dlm.config.architecture import ParallelConfig
from megatron_dlm.config.schema import OptimizerConfig
from megatron_dlm.models.build import LanguageModel
from megatron_dlm.runtime.parallel import ParallelContext


def wrap_data_parallel(
    chunks: Sequence[LanguageModel], config: ParallelConfig, parallel: ParallelContext
) -> list[DistributedDataParallel]:
    """Give every chunk gradient buffers that are summed (never averaged) over the DP ranks in fp32.

    Megatron then divides once by the global token count, which is the only normalisation that is
    the same for every split of the batch.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
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
) -> MegatronOptimizer:
    """AdamW whose state is sharded over the DP ranks; norms and biases get no weight decay."""
    model_config = chunks[0].module.config
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            # The norm is always computed: it is logged and guards against NaN.
            clip_grad=config.clip_grad or sys.float_info.max,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap_param_gather,
        ),
        list(chunks),
    )
    for part in optimizer_parts(optimizer):
        # Without Transformer Engine and Apex this is PyTorch's, by default not fused.
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use this learning rate for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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
