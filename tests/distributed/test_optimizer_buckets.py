"""What a checkpoint says about optimizer state, however gradients are cut into padded buckets."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opened import opened_model
from rank_pool import RankPool
from resume_run import write_shards
from test_resume import TP2_PP2, check_metrics, killed_after_five, train
from tiny_run import Layout, layout, model_config

from megatron_dlm.config.optimizer import OptimizerConfig

MASTER = "optimizer.state.param."
# Gains of 6 and biases of 36 numbers: hardly any bucket ends at a multiple of 128.
MODEL = model_config(
    hidden_size=24, num_query_groups=None, kv_channels=6, megatron={"add_qkv_bias": True}
)
BIASED = model_config(num_layers=2, num_query_groups=None, megatron={"add_qkv_bias": True})
EXPERTS = dataclasses.replace(
    MODEL, moe=dataclasses.replace(MODEL.moe, num_experts=4), megatron={}, num_attention_heads=4
)
CUT = {"overlap_grad_reduce": True, "bucket_size_parameters": 1000}
FOR_NCCL = {
    "overlap_grad_reduce": True,
    "bucket_size_parameters": 40_000,
    "pad_buckets_for_high_nccl_busbw": True,
}
CASES = {
    "tied embedding, TP2 x PP2": (layout("", 4, tp=2, pp=2), BIASED),
    "small buckets, DP2": (layout("", 2, **CUT), MODEL),
    "small buckets, DP3": (layout("", 3, **CUT), MODEL),
    "buckets for NCCL, DP2": (
        layout("", 2, **FOR_NCCL),
        dataclasses.replace(MODEL, hidden_size=96),
    ),
    "experts, EP2": (layout("", 2, ep=2, **CUT), EXPERTS),
}


def saved_state(where: Layout, model: Any) -> dict[str, Any]:
    """Of this rank: parameters whose saved master weights differ, and how many buckets end early.

    In fp32 master weights are the weights; the state of a neighbour, or zeros, would not be.
    """
    import torch

    from megatron_dlm.checkpoint.state import model_state, optimizer_parts, optimizer_state
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel

    with opened_model(where.parallel, model) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        with torch.no_grad():  # gains all begin as ones, biases as zeros
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    places = torch.arange(parameter.numel()).view_as(parameter)
                    parameter += zlib.crc32(name.encode()) % 97 + places / 1024
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(), overlap_param_gather=False)
        sharded = model_state(chunks, parallel)
        optimizer_state(optimizer, sharded, parallel, is_loading=True)  # gives it a state
        saved = optimizer_state(optimizer, sharded, parallel, is_loading=False)
        weights = {place(shard): shard.data.detach() for shard in shards_of(sharded)}
        masters = [shard for shard in shards_of(saved) if MASTER in shard.key]
        different = [
            shard.key for shard in masters if not torch.equal(shard.data, weights[place(shard)])
        ]
        buffers = [buffer for part in optimizer_parts(optimizer) for buffer in part.buffers]
        early = sum(
            bucket.numel_unpadded < len(bucket.grad_data)
            for buffer in buffers
            for bucket in buffer.buckets[:-1]
        )
    return {"compared": len(masters), "different": different, "early": early}


def shards_of(state: Any) -> Iterator[Any]:
    """Every ShardedTensor of a state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for item in nested_values(state):
        if isinstance(item, ShardedTensorFactory):
            yield from shards_of(item.build())
        elif isinstance(item, ShardedTensor) and item.data is not None:
            yield item


def place(shard: Any) -> tuple[str, tuple[int, ...]]:
    """Which part of which parameter this is, or is the state of."""
    return shard.key.replace(MASTER, ""), shard.global_offset


@pytest.mark.parametrize("name", CASES)
def test_master_weights_are_saved_under_their_names(ranks: RankPool, name: str) -> None:
    where, model = CASES[name]
    results = ranks.run(saved_state, where, model, num_ranks=where.num_ranks)
    assert sum(result["compared"] for result in results) > 10
    assert sum(result["early"] for result in results) > 0, "no bucket was padded"
    assert [result["different"] for result in results] == [[]] * where.num_ranks


def test_a_run_with_biases_goes_on_on_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    """One layer a stage and a tied embedding: its bucket lies behind one that is padded."""
    shards = write_shards(tmp_path)
    flags = ["--model.megatron={add_qkv_bias: true}", "--model.num_layers=2"]
    four_ranks = [*flags, *TP2_PP2]
    whole = train(ranks, shards, tmp_path / "whole", four_ranks, num_ranks=4)
    run = killed_after_five(tmp_path / "whole", tmp_path / "again")
    again = train(ranks, shards, run, four_ranks, num_ranks=4)
    check_metrics(again, whole, tolerance=0)
    run = killed_after_five(tmp_path / "whole", tmp_path / "one")
    check_metrics(train(ranks, shards, run, flags), whole, tolerance=1e-5)
