"""Initial weights: a pure function of (seed, parameter, place in it), the same on any layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.ops.counter_rng import Stream, normal

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(sharded_state: Mapping[str, object], model: ModelConfig, seed: int) -> None:
    """Fill every parameter in place: N(0, std), norms 1, biases 0.

    `sharded_state` is a model chunk's sharded state dict: it knows each local shard's name and
    place in the whole model, so every layout draws the same whole. Residual outputs get
    std / sqrt(2 * num_layers), as in Megatron and GPT-2.
    """
    for shard in _shards(sharded_state):
        tensor = shard.data
        name = shard.key
        if name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name:  # final_layernorm.weight, linear_qkv.layer_norm_weight
            tensor.fill_(1.0)
        else:
            scaled = name.endswith(_RESIDUAL_OUTPUTS)
            std = model.init_method_std / (math.sqrt(2 * model.num_layers) if scaled else 1.0)
            _fill_normal(tensor, shard, std=std, seed=seed)


def _shards(tree: object) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        if tree.data is not None:
            yield tree
    elif isinstance(tree, ShardedTensorFactory):
        yield from _shards(tree.build())
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _shards(value)
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for value in tree:
            yield from _shards(value)


def _fill_normal(tensor: Tensor, shard: ShardedTensor, *, std: float, seed: int) -> None:
    """Draw the rows of `tensor` at their place in the whole parameter (layers stacked first)."""
    assert tensor.dim() == 2, f"{shard.key} has shape {tuple(tensor.shape)}"
    *stacked, row_start, column_start = shard.global_offset
    row_start += (stacked[0] if stacked else 0) * shard.global_shape[-2]
    key = int.from_bytes(hashlib.sha256(shard.key.encode()).digest()[:4], "big")
    rows, columns = tensor.shape
    index = torch.arange(row_start, row_start + rows, device=tensor.device)
    position = torch.arange(column_start, column_start + columns, device=tensor.device)
    values = normal(seed, Stream.INITIALIZATION, key, index[:, None], position[None, :])
    tensor.copy_(values.mul_(std))
