"""A tiny model on any layout, its loss and its whole gradient; runs inside the ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from opened import GLOBAL_BATCH, SEED, VOCAB_SIZE, opened_model

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import OptimizerConfig
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream


@dataclass(frozen=True)
class Layout:
    """How one global batch of 8 samples is split."""

    name: str
    num_ranks: int = 1
    micro_batch: int = 2
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    loss_chunk_slots: int | None = None


def layout(name: str, num_ranks: int, *, micro: int = 2, **sizes: Any) -> Layout:
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "sp": "sequence_parallel",
        "cp": "context_parallel_size",
        "comm": "context_parallel_comm",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    parallel = ParallelConfig(**{short.get(key, key): value for key, value in sizes.items()})
    return Layout(name, num_ranks, micro, parallel)


# Two micro-batches where splitting samples is not the point: every collective costs the same.
LAYOUTS = [
    layout("micro 1", 1, micro=1),
    layout("micro 8", 1, micro=8),
    layout("TP2", 2, micro=4, tp=2),
    layout("TP2 + SP", 2, micro=4, tp=2, sp=True),
    layout("PP2", 2, pp=2),
    layout("PP2 + VPP2", 2, pp=2, vpp=2),
    layout("DP2", 2),
    layout("DP2 overlapped", 2, micro=1, overlap_grad_reduce=True, overlap_param_gather=True),
    layout("DP4", 4),
    layout("TP2 x PP2", 4, micro=4, tp=2, pp=2),
    layout("TP2 + SP x PP2 + VPP2", 4, micro=4, tp=2, pp=2, sp=True, vpp=2),
    layout("TP2 + SP x DP2", 4, tp=2, sp=True),
    layout("PP4", 4, pp=4),
    layout("CP2", 2, micro=4, cp=2),
    layout("CP2 by heads", 2, micro=4, cp=2, comm="a2a"),
    layout("CP2 x TP2 + SP", 4, micro=4, cp=2, tp=2, sp=True),
    layout("CP2 x PP2 + VPP2 by heads", 4, micro=4, cp=2, pp=2, vpp=2, comm="a2a"),
    layout("CP2 x DP2", 4, cp=2),
    layout("CP4", 4, micro=4, cp=4),
]


def model_config(**changes: Any) -> ModelConfig:
    defaults = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 16,
        "vocab_size": VOCAB_SIZE,
        "make_vocab_size_divisible_by": 64,
        "init_method_std": 0.2,
    }
    return ModelConfig(**{**defaults, **changes})


def token_batch(first: int, count: int, seq_length: int, *, documents: bool) -> TokenBatch:
    """Samples [first, first + count) of a fixed made-up text; a few slots are not valid.

    documents: every row is a handful of documents, of lengths from one token up.
    """
    rows = [
        np.random.default_rng(1000 + index).integers(0, VOCAB_SIZE - 1, seq_length + 1)
        for index in range(first, first + count)
    ]
    valid = torch.ones(count, seq_length + 1, dtype=torch.bool)
    if first == 0:
        valid[0, :3] = False
    index = torch.arange(first, first + count)
    return TokenBatch(
        tokens=torch.from_numpy(np.stack(rows)),
        valid=valid,
        sample_index=index,
        document=made_up_documents(index, seq_length + 1) if documents else None,
    )


def made_up_documents(sample_index: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [b, length]: a document ends behind a token with probability 0.2."""
    draws = [np.random.default_rng(2000 + index).random(length) for index in sample_index.tolist()]
    ends = np.stack(draws) < 0.2
    return torch.from_numpy(np.cumsum(ends, axis=1) - ends)


def run_layout(
    where: Layout,
    objective: ObjectiveConfig,
    model: ModelConfig,
    num_steps: int,
    documents: bool = False,
) -> dict[str, Any]:
    """Metrics and gradient norm of each step, noise and whole gradient of the first (this rank)."""
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import run_micro_batches, train_step

    with opened_model(where.parallel, model, objective) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        initial = own_shards(chunks, parallel, gradients=False)
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        overlapped = where.parallel.overlap_param_gather
        # Adam's first updates have the size of lr even where a gradient is only rounding noise:
        # a large lr would blow rounding differences up. With documents one such gradient happens to
        # be there (1e-8 here, -5e-8 under TP2, of at most 0.2): there eps lies above the noise.
        adam = OptimizerConfig(lr=1e-3, adam_eps=1e-6 if documents else 1e-8)
        optimizer = build_optimizer(wrapped, adam, overlap_param_gather=overlapped)
        setup = opened.pass_of(wrapped, loss_chunk_slots=where.loss_chunk_slots)
        built, metrics = setup.objective, setup.metrics
        batches = micro_batches(where, parallel, 0, model.seq_length, documents=documents)
        inputs = [built.prepare(batch, SEED, Stream.TRAINING) for batch in batches]
        noise = {
            int(index): (row.tolist(), weights.tolist())
            for batch, given in zip(batches, inputs, strict=True)
            for index, row, weights in zip(
                batch.sample_index, given.tokens, given.weights, strict=True
            )
        }
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_micro_batches(setup, batches, forward_only=False)
        first = metrics.reduce()
        gather_gradients(wrapped)
        gradients = own_shards(chunks, parallel, gradients=True)
        curve = []
        for step in range(num_steps):
            batches = micro_batches(where, parallel, step, model.seq_length, documents=documents)
            grad_norm = train_step(setup, optimizer, batches)
            curve.append({**metrics.reduce(), "grad_norm": grad_norm})
    return {
        "first": first,
        "noise": noise,
        "initial": initial,
        "gradients": gradients,
        "curve": curve,
    }


def micro_batches(
    where: Layout, parallel: Any, step: int, seq_length: int, *, documents: bool
) -> list[TokenBatch]:
    size, rank = parallel.data.size, parallel.data.rank
    starts = range(rank * where.micro_batch, GLOBAL_BATCH, where.micro_batch * size)
    first = step * GLOBAL_BATCH
    return [
        token_batch(first + start, where.micro_batch, seq_length, documents=documents)
        for start in starts
    ]


def gather_gradients(wrapped: list[Any]) -> None:
    """Undo the scatter of the distributed optimizer: every rank gets its shard's whole gradient."""
    for chunk in wrapped:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = list(bucket.grad_data.chunk(ranks.size()))
                own = shards[ranks.rank()].clone()
                dist.all_gather(shards, own, group=ranks)


def own_shards(
    chunks: list[Any], parallel: Any, *, gradients: bool
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """(name, whole shape, offset, values) of every parameter shard of this rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_dlm.models.build import sharding_metadata

    found = []
    for chunk in chunks:
        for item in chunk.sharded_state_dict(metadata=sharding_metadata(parallel)).values():
            if getattr(item, "data", None) is None or not hasattr(item, "key"):
                continue
            if gradients and not hasattr(item.data, "main_grad"):  # a buffer
                continue
            data = item.data.main_grad if gradients else item.data
            item = dataclasses.replace(item, data=data)
            parts = item.build() if isinstance(item, ShardedTensorFactory) else [item]
            for part in parts:
                values = part.data.detach().numpy().copy()
                found.append(
                    (part.key, tuple(part.global_shape), tuple(part.global_offset), values)
                )
    return found


def assemble(results: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """The whole parameters (or gradients) from the shards of all ranks; replicas must agree."""
    whole: dict[str, np.ndarray] = {}
    for result in results:
        for key, shape, offset, values in result[what]:
            target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            block = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            place = tuple(
                slice(start, start + size) for start, size in zip(offset, block.shape, strict=True)
            )
            known = target[place]
            if not np.isnan(known).all():
                np.testing.assert_allclose(known, block, rtol=0, atol=1e-5 * np.abs(block).max())
            target[place] = block
    for key, values in whole.items():
        assert not np.isnan(values).any(), f"{key} is not covered by the shards"
    return whole
