"""A model with any options on any layout, under any attention: its logits and gradients."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opened import VOCAB_SIZE, opened_model
from tiny_run import Layout, gather_gradients, micro_batches, own_shards
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.objectives.base import LossSums, target_nll
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

_PLACES = 1000
"""A slot's number is its sample times this, plus its place."""


@dataclass
class EverySlot:
    """An objective that scores every slot with a weight of its own, and keeps the logits."""

    attention: AttentionPattern
    metric_names: tuple[str, ...] = ("loss",)
    kept: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Numbers of slots [n] and their logits on this TP rank [n, V/tp]."""

    def model_length(self, seq_length: int) -> int:
        return 2 * seq_length if self.attention is AttentionPattern.BLOCK else seq_length

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        return seq_length

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor | None:
        if self.attention is not AttentionPattern.ARBITRARY:
            return None
        return hiding_mask(batch.sample_index, batch.tokens.shape[1] - 1)

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        tokens = batch.tokens[:, :-1]
        if self.attention is AttentionPattern.BLOCK:
            tokens = twofold(tokens)
        number = batch.sample_index[:, None] * _PLACES + torch.arange(tokens.shape[1])
        weights = 1 + (number % 7).float()
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        return ModelInputs(
            tokens=tokens,
            position_ids=number,
            targets=(tokens + number) % VOCAB_SIZE,
            weights=weights,
            elbo_weights=weights,
            counted=everywhere,
            valid=everywhere,
            noise_level=torch.zeros_like(weights),
        )

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        self.kept.append((rows.position_ids.numpy(), logits.detach().numpy().copy()))
        loss = (target_nll(logits, rows, VOCAB_SIZE, tp_group) * rows.weights).sum()
        return LossSums(loss, {"loss": loss.detach()})

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        return {"loss": inputs.counted.sum(dtype=torch.float32)}


def twofold(tokens: Tensor) -> Tensor:
    """[made-up noise; clean] for the BLOCK pattern."""
    return torch.cat([(tokens * 5 + 3) % VOCAB_SIZE, tokens], dim=1)


def hiding_mask(sample_index: Tensor, length: int) -> Tensor:
    """bool [b, 1, s, s], True hides: a third of the keys, others for every sample, never itself."""
    draws = [
        np.random.default_rng(3000 + i).random((length, length)) for i in sample_index.tolist()
    ]
    hidden = torch.from_numpy(np.stack(draws) < 1 / 3)
    return (hidden & ~torch.eye(length, dtype=torch.bool))[:, None]


def run_options(where: Layout, model: ModelConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """Weights, gradients (see tiny_run) and logits of the slots that this rank scored."""
    from megatron_dlm.training.optimizer import wrap_data_parallel
    from megatron_dlm.training.step import run_micro_batches

    with opened_model(where.parallel, model, objective) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        for chunk in chunks:
            move_from_start(chunk, parallel)
        weights = own_shards(chunks, parallel, gradients=False)
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        every = EverySlot(objective.attention)
        setup = opened.pass_of(wrapped, every)
        batches = micro_batches(where, parallel, 0, model.seq_length, documents=False)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_micro_batches(setup, batches, forward_only=False)
        gather_gradients(wrapped)
        return {
            "weights": weights,
            "gradients": own_shards(chunks, parallel, gradients=True),
            "logits": every.kept,
            "tensor_rank": parallel.tensor.rank,
        }


def logits_of(
    model: ModelConfig,
    objective: ObjectiveConfig,
    several_tokens: Sequence[Tensor],
    *,
    device: str = "cpu",
    precision: str = "fp32",
) -> list[Tensor]:
    """fp32 [b, s, V] of one model on one rank, for every [b, s] of several_tokens."""
    alone = ParallelConfig()
    with (
        opened_model(alone, model, objective, precision=precision, device=device) as opened,
        torch.no_grad(),
    ):
        chunk, parallel = opened.chunk, opened.parallel
        move_from_start(chunk, parallel)
        found = []
        for tokens in several_tokens:
            mask = None
            if objective.attention is AttentionPattern.ARBITRARY:
                mask = hiding_mask(torch.arange(len(tokens)), tokens.shape[1]).to(device)
            logits = chunk(
                tokens.to(device), torch.zeros_like(tokens).to(device), attention_mask=mask
            )
            found.append(logits.float().view(*tokens.shape, -1).cpu())
        return found


@torch.no_grad()
def move_from_start(chunk: Any, parallel: Any) -> None:
    """Add noise to what begins as zeros or ones, the same on every layout: gains, biases, sinks."""
    for shard in _shards_of(chunk, parallel):
        if not shard.key.endswith(("norm.weight", "norm_weight", "bias", "sink_key", "sink_value")):
            continue
        whole = np.random.default_rng(zlib.crc32(shard.key.encode())).normal(
            size=shard.global_shape
        )
        stacked = (1,) * (len(shard.global_shape) - shard.data.dim())
        place = tuple(
            slice(start, start + size)
            for start, size in zip(shard.global_offset, stacked + shard.data.shape, strict=True)
        )
        noise = torch.from_numpy(whole[place]).view(shard.data.shape)
        shard.data.add_(0.2 * noise.to(shard.data))


def _shards_of(chunk: Any, parallel: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_dlm.models.build import sharding_metadata

    for item in chunk.sharded_state_dict(metadata=sharding_metadata(parallel)).values():
        if getattr(item, "data", None) is None or not hasattr(item, "key"):
            continue
        item = dataclasses.replace(item, data=item.data.detach())
        yield from item.build() if isinstance(item, ShardedTensorFactory) else [item]


def assemble_logits(results: list[dict[str, Any]]) -> np.ndarray:
    """fp32 [slots, V] of all scored slots, by their number."""
    parts: dict[tuple[int, int], np.ndarray] = {}
    for result in results:
        for numbers, logits in result["logits"]:
            for number, row in zip(numbers.tolist(), logits, strict=True):
                parts[number, result["tensor_rank"]] = row
    numbers = sorted({number for number, _ in parts})
    tensor_ranks = sorted({rank for _, rank in parts})
    return np.stack([np.concatenate([parts[n, rank] for rank in tensor_ranks]) for n in numbers])
