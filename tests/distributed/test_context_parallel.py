"""Ranks that share every sequence: the exchange itself, and whole runs against one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opened import opened_model
from rank_pool import RankPool
from resume_run import write_shards
from test_invariance import MODELS, check_equal, reference, run
from test_model_options import PATTERNS, compare
from test_resume import check_metrics, final_tensors, killed_after_five, train
from tiny_run import LAYOUTS, model_config
from torch import Tensor

from megatron_dlm.config.parallel import ParallelConfig

CP2 = ["--parallel.context_parallel_size=2"]
BY_HEADS = "--parallel.context_parallel_comm=a2a"
LENGTH, ROWS, HEADS, GROUPS, WIDTH = 16, 2, 8, 4, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exchange(context_size: int) -> dict[str, list[Any]]:
    """What every exchange gives this rank, and the gradients of fixed weighted sums of it."""
    from megatron_dlm.ops.context_parallel import (
        gather_sequence,
        heads_for_slots,
        local_part,
        slots_for_heads,
    )
    from megatron_dlm.runtime.parallel import laid_out

    with laid_out(ParallelConfig(context_parallel_size=context_size)) as parallel:
        rank, group = parallel.context.rank, parallel.context.group

        def own(whole: Tensor) -> Tensor:
            return local_part(whole, 0, rank=rank, size=context_size).clone().requires_grad_()

        parts = [
            own(draw(LENGTH, ROWS, heads, WIDTH, seed=seed))
            for seed, heads in enumerate((HEADS, GROUPS, GROUPS))
        ]
        gathered = gather_sequence(parts[1], parts[2], group)
        traded = slots_for_heads(parts, group)
        flat = [part.flatten(2).detach().requires_grad_() for part in traded]
        back = [heads_for_slots(part, group) for part in flat]
        found = {"gathered": gathered, "traded": traded, "back": back}
        answer: dict[str, list[Any]] = {}
        for name, outputs in found.items():
            inputs = {"gathered": parts[1:], "traded": parts, "back": flat}[name]
            total = sum((output * (rank + 1 + output.detach())).sum() for output in outputs)
            answer[name] = [output.detach() for output in outputs]
            answer[f"gradients of {name}"] = list(torch.autograd.grad(total, inputs))
        return answer


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_and_their_gradients(ranks: RankPool, size: int) -> None:
    """The gradient of x * (r + 1 + constant x) on rank r is r + 1 + x, summed over the users."""
    from megatron_dlm.ops.context_parallel import local_part

    wholes = [
        draw(LENGTH, ROWS, heads, WIDTH, seed=seed)
        for seed, heads in enumerate((HEADS, GROUPS, GROUPS))
    ]
    factors = sum(range(1, size + 1))
    for rank, found in enumerate(ranks.run(exchange, size, num_ranks=size)):

        def own(whole: Tensor, rank: int = rank) -> Tensor:
            return local_part(whole, 0, rank=rank, size=size)

        for got, whole in zip(found["gathered"], wholes[1:], strict=True):
            assert torch.equal(got, whole)
        for got, whole in zip(found["gradients of gathered"], wholes[1:], strict=True):
            torch.testing.assert_close(got, factors + size * own(whole))
        for number, whole in enumerate(wholes):
            shares = whole.chunk(size, dim=2)
            assert torch.equal(found["traded"][number], shares[rank])
            users = torch.cat([share + r + 1 for r, share in enumerate(shares)], dim=2)
            torch.testing.assert_close(found["gradients of traded"][number], own(users))
            assert torch.equal(found["back"][number], own(whole).flatten(2))
            users = torch.cat(
                [local_part(whole, 0, rank=r, size=size) + r + 1 for r in range(size)]
            )
            in_sequence = torch.cat(
                [local_part(torch.arange(LENGTH), 0, rank=r, size=size) for r in range(size)]
            ).argsort()
            wanted = users[in_sequence].chunk(size, dim=2)[rank].flatten(2)
            torch.testing.assert_close(found["gradients of back"][number], wanted)


def communication(parallel_config: ParallelConfig) -> list[bool]:
    """Whether each layer trades slots for heads."""
    with opened_model(parallel_config, model_config()) as opened:
        layers = opened.chunk.decoder.layers
        return [layer.self_attention.core_attention.trades_slots_for_heads for layer in layers]


@pytest.mark.parametrize(
    ("comm", "trades"), [("auto", False), ("all_gather", False), ("a2a", True)]
)
def test_the_kind_of_communication_is_used(ranks: RankPool, comm: str, trades: bool) -> None:
    config = ParallelConfig(context_parallel_size=2, context_parallel_comm=comm)
    for found in ranks.run(communication, config, num_ranks=2):
        assert found == [trades] * 4


@pytest.mark.parametrize("objective", PATTERNS)
@pytest.mark.parametrize("name", ["CP2", "CP2 by heads"])
def test_every_option_in_every_pattern(ranks: RankPool, name: str, objective: str) -> None:
    """Soft cap, sink, norms over all heads, biases: logits and gradients of one rank."""
    compare(ranks, "everything", objective, name)


@pytest.mark.parametrize("name", ["CP2", "CP2 by heads"])
def test_recomputation_exchanges_again(ranks: RankPool, name: str) -> None:
    compare(ranks, "everything, full recompute", "arbitrary", name)


@pytest.mark.parametrize(
    ("name", "objective", "model"),
    [
        ("CP2", "autoregressive", "tied"),
        ("CP2", "uniform", "tied"),
        ("CP2 by heads", "autoregressive", "tied"),
        ("CP2 by heads", "elbo", "tied"),
        ("CP2 x TP2 + SP", "elbo", "squared relu, selective recompute"),
        ("CP2 x PP2 + VPP2 by heads", "elbo", "tied"),
        ("CP4", "elbo", "gelu, full recompute"),
    ],
)
def test_documents(ranks: RankPool, name: str, objective: str, model: str) -> None:
    """They end anywhere, also inside the chunk of a rank."""
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, where, objective, MODELS[model], documents=True)
    check_equal(ours, reference(ranks, objective, model, documents=True))


@pytest.mark.parametrize(
    ("name", "objective"), [("CP2 x TP2 + SP", "hybrid"), ("CP2 by heads", "block")]
)
def test_chunks_of_the_loss(ranks: RankPool, name: str, objective: str) -> None:
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, replace(where, loss_chunk_slots=5), objective, MODELS["tied"])
    check_equal(ours, reference(ranks, objective, "tied"))


def test_checkpoints_continue_on_more_and_fewer_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Weights, moments, training and validation: CP2 x DP2 from one rank, one rank from CP2."""
    shards = write_shards(tmp_path / "shards")
    whole = train(ranks, shards, tmp_path / "whole")
    split = killed_after_five(tmp_path / "whole", tmp_path / "split")
    check_metrics(train(ranks, shards, split, CP2, num_ranks=4), whole, tolerance=1e-5)
    two = tmp_path / "two"
    metrics = train(ranks, shards, two, [*CP2, BY_HEADS], num_ranks=2)
    check_metrics(metrics, whole, tolerance=1e-5)
    one = killed_after_five(two, tmp_path / "one")
    check_metrics(train(ranks, shards, one), whole, tolerance=1e-5)
    theirs = final_tensors(ranks, tmp_path / "whole")
    for run_directory in (split, one):
        ours = final_tensors(ranks, run_directory)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            atol = 1e-5 * np.abs(values).max()
            np.testing.assert_allclose(ours[name], values, rtol=0, atol=atol, err_msg=name)


def test_cropped_steps(ranks: RankPool, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    flags = [
        "--objective.variable_length_probability=0.7",
        "--objective.variable_length_multiple=4",
        "--logging.interval_steps=1",
    ]
    one = train(ranks, shards, tmp_path / "one", flags)
    two = train(ranks, shards, tmp_path / "two", [*flags, *CP2], num_ranks=2)
    check_metrics(two, one, tolerance=1e-5)
