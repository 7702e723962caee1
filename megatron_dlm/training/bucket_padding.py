"""Optimizer state as Megatron Core's checkpoints expect it: at the places of the gradient buffers.

Its `fully_reshardable` format gathers the state of a buffer without the padding that ends each
bucket, then cuts it where parameters lie in the buffer with that padding. Behind the first padded
bucket every parameter would be saved with numbers of its neighbours, the last ones with zeros (it
warns "param range exceeds unpadded buffer"). Here the padding is put back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_GATHERED = ("param", "exp_avg", "exp_avg_sq")


def keep_bucket_padding(optimizer: DistributedOptimizer) -> None:
    """Make this optimizer's gathered state as long as its buffers, in checkpoints to come."""
    gather = optimizer.get_parameter_state_dp_zero

    def gather_padded(*arguments: Any, **options: Any) -> dict[Any, Any] | None:
        state: dict[Any, Any] | None = gather(*arguments, **options)
        if state is None:  # gathered on another data-parallel rank
            return None
        for number, buffer in enumerate(optimizer.buffers):
            for tensors in state[number].values():
                for name in _GATHERED:
                    tensors[name] = padded(tensors[name], buffer)
        return state

    optimizer.get_parameter_state_dp_zero = gather_padded


def padded(values: Tensor, buffer: _ParamAndGradBuffer) -> Tensor:
    """[elements of all buckets] -> [elements of the buffer], zeros where the buffer is padded."""
    if buffer.numel == buffer.numel_unpadded:
        return values
    result = torch.zeros(buffer.numel, dtype=values.dtype, device=values.device)
    parts = values.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        result[bucket.offset : bucket.offset + len(part)] = part
    return result
