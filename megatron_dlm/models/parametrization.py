"""How the settings of a run become those of every parameter: initial weights, rates, decay.

Initial weights are a pure function of (seed, parameter, place in it), the same on any layout. The
tables for standard and CompleteP are in docs/parametrization.md.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.ops.counter_rng import Stream, normal

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


class ParameterKind(Enum):
    """What a parameter does; each kind starts and learns in its own way."""

    BULK = r"\.linear_(qkv|proj|fc1|fc2)\.weight\d*$"
    """Matrices of the layers, also of their experts."""
    ROUTER = r"\.(router\.weight|shared_experts\.gate_weight)$"
    """Scores of the experts, and the gate of the shared one."""
    EMBEDDING = r"(^|\.)embedding\.word_embeddings\.weight$"
    OUTPUT_LAYER = r"(^|\.)output_layer\.weight$"
    NORM = r"norm[._]weight$"
    """Gains, also those that Transformer Engine keeps beside the matrix behind the norm."""
    BIAS = r"\.(bias\d*|expert_bias|sink_key|sink_value)$"
    """Biases, and the key and value that every head sees besides those of the tokens."""


def kind_of(name: str) -> ParameterKind:
    """The kind of a parameter, from its name in the model or in a checkpoint."""
    kinds = [kind for kind in ParameterKind if re.search(kind.value, name)]
    assert len(kinds) == 1, f"{name} is of kinds {kinds}: say in ParameterKind how it learns"
    return kinds[0]


@dataclass(frozen=True)
class UpdateSettings:
    """How one kind of parameter is updated."""

    lr_scale: float
    """Its learning rate as a multiple of the run's."""
    weight_decay_scale: float
    """Its weight decay as a multiple of the run's."""
    epsilon: float


def update_settings(
    kind: ParameterKind, optimizer: OptimizerConfig, *, hidden_size: int, num_layers: int
) -> UpdateSettings:
    """Standard: one rate, decay of matrices. CompleteP: see OptimizerConfig."""
    is_matrix = kind not in (ParameterKind.NORM, ParameterKind.BIAS)
    if optimizer.parametrization == "standard":
        return UpdateSettings(1.0, 1.0 if is_matrix else 0.0, optimizer.adam_eps)
    epsilon = optimizer.adam_eps / (hidden_size * num_layers)
    if kind is ParameterKind.BULK:
        # The product of rate and decay, what a weight loses per step, is the same for all widths.
        return UpdateSettings(1 / hidden_size, float(hidden_size), epsilon)
    return UpdateSettings(optimizer.auxiliary_lr_scale, 0.0, epsilon)


@torch.no_grad()
def initialize_weights(
    sharded_state: Mapping[str, object],
    model: ModelConfig,
    seed: int,
    *,
    optimizer: OptimizerConfig,
) -> None:
    """Fill every parameter in place: matrices N(0, std), norms with the identity, biases 0.

    `sharded_state` is a model chunk's sharded state dict: it knows each local shard's name and
    place in the whole model, so every layout draws the same whole.
    """
    for shard in _shards(sharded_state):
        kind = kind_of(shard.key)
        std = initial_std(shard.key, model, optimizer)
        if kind is ParameterKind.NORM:
            shard.data.fill_(0.0 if model.layernorm_zero_centered_gamma else 1.0)
        elif std == 0:
            shard.data.zero_()
        else:
            _fill_normal(shard.data, shard, std=std, seed=seed)


def initial_std(name: str, model: ModelConfig, optimizer: OptimizerConfig) -> float:
    """Standard deviation of the initial values of a parameter; 0 for norms and biases.

    Matrices of the layers: init_method_std, residual outputs by sqrt(2 * num_layers) less as in
    Megatron and GPT-2; with CompleteP bulk_init_scale / sqrt(hidden_size). Embedding and output
    layer: init_method_std, output_init_std.
    """
    kind = kind_of(name)
    if kind in (ParameterKind.NORM, ParameterKind.BIAS):
        return 0.0
    if kind is ParameterKind.OUTPUT_LAYER and model.output_init_std is not None:
        return model.output_init_std
    if kind is not ParameterKind.BULK:
        return model.init_method_std
    if optimizer.parametrization == "completep":
        return optimizer.bulk_init_scale / math.sqrt(model.hidden_size)
    is_residual = name.endswith(_RESIDUAL_OUTPUTS)
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if is_residual else 1.0)


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
    """Draw the rows of `tensor` at their place in the whole parameter (layers, experts stacked)."""
    assert tensor.dim() == 2, f"{shard.key} has shape {tuple(tensor.shape)}"
    stack = 0
    *stacked, row_start, column_start = shard.global_offset
    for place, size in zip(stacked, shard.global_shape, strict=False):  # layer, then expert
        stack = stack * size + place
    row_start += stack * shard.global_shape[-2]
    start = (row_start, column_start)
    shape = (tensor.shape[0], tensor.shape[1])
    device = tensor.device
    tensor.copy_(initial_values(shard.key, shape, std=std, seed=seed, start=start, device=device))


def initial_values(
    name: str,
    shape: tuple[int, int],
    *,
    std: float,
    seed: int,
    start: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
) -> Tensor:
    """fp32 N(0, std) of `shape`: the part of parameter `name` that begins at row, column `start`.

    Rows of stacked layers and experts count on from one to the next.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    (rows, columns), (row_start, column_start) = shape, start
    index = torch.arange(row_start, row_start + rows, device=device)
    position = torch.arange(column_start, column_start + columns, device=device)
    values = normal(seed, Stream.INITIALIZATION, key, index[:, None], position[None, :])
    return values.mul_(std)
