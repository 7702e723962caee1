"""Options that save time or memory change no number; those that round say how much."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from opened import opened_model
from rank_pool import RankPool
from tiny_run import Layout, assemble, layout, model_config, run_layout

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig

MODEL = model_config()
EXPERTS = model_config(
    num_layers=2, moe=MoEConfig(num_experts=4, ffn_hidden_size=32, shared_expert_ffn_hidden_size=32)
)
OBJECTIVE = ObjectiveConfig()


def check_equal(
    ranks: RankPool, changed: Layout, plain: Layout, *models: ModelConfig, tolerance: float
) -> None:
    """Whole gradients and three steps of `changed` with the first model, `plain` with the last."""
    ours = ranks.run(run_layout, changed, OBJECTIVE, models[0], 3, num_ranks=changed.num_ranks)
    theirs = ranks.run(run_layout, plain, OBJECTIVE, models[-1], 3, num_ranks=plain.num_ranks)
    wanted = assemble(theirs, "gradients")
    for name, values in assemble(ours, "gradients").items():
        atol = tolerance * np.abs(wanted[name]).max()
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=atol, err_msg=name)
    for mine, its in zip(ours[0]["curve"], theirs[0]["curve"], strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(its[name], rel=tolerance, abs=0), name


@pytest.mark.parametrize(
    ("sizes", "num_ranks"),
    [({}, 1), ({"tp": 2, "sp": True}, 2), ({"pp": 2}, 2)],
    ids=["one rank", "TP2 + SP", "PP2"],
)
def test_fused_gradient_accumulation(
    ranks: RankPool, sizes: dict[str, Any], num_ranks: int
) -> None:
    """Also of the tied embedding, whose gradient has two sources."""
    plain = layout("", num_ranks, **sizes)
    fused = layout("", num_ranks, **sizes, gradient_accumulation_fusion=True)
    check_equal(ranks, fused, plain, MODEL, tolerance=1e-6)
    if num_ranks == 1:
        in_chunks = dataclasses.replace(fused, loss_chunk_slots=5)
        check_equal(ranks, in_chunks, plain, MODEL, tolerance=1e-5)


def test_small_buckets(ranks: RankPool) -> None:
    plain = layout("", 2)
    cut = layout(
        "",
        2,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size_parameters=1000,
    )
    check_equal(ranks, cut, plain, MODEL, tolerance=1e-6)


RECOMPUTE = {
    "attention": (MODEL, ["core_attn"]),
    "MLP": (MODEL, ["mlp"]),
    "experts": (EXPERTS, ["moe"]),
    "shared experts": (EXPERTS, ["core_attn", "shared_experts"]),
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputed_modules(ranks: RankPool, name: str) -> None:
    model, modules = RECOMPUTE[name]
    recomputing = dataclasses.replace(
        model, recompute_granularity="selective", recompute_modules=modules
    )
    where = layout("", 2, tp=2, sp=True)
    check_equal(ranks, where, where, recomputing, model, tolerance=1e-7)


def deterministic_run(where: Layout, model: ModelConfig) -> dict[str, Any]:
    """run_layout with torch's switch on, and back."""
    import os

    import torch

    from megatron_dlm.models.transformer_config import transformer_config
    from megatron_dlm.runtime.determinism import use_deterministic_kernels
    from megatron_dlm.runtime.device import open_device

    before = dict(os.environ)
    use_deterministic_kernels()
    try:
        config = transformer_config(
            model, where.parallel, precision="fp32", device=open_device("cpu")
        )
        variables = {name: os.environ[name] for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")}
        return {
            "mode": config.deterministic_mode,
            "variables": variables,
            **run_layout(where, OBJECTIVE, model, 3),
        }
    finally:
        torch.use_deterministic_algorithms(False)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def test_deterministic_runs_repeat_bit_for_bit(ranks: RankPool) -> None:
    where = layout("", 2, tp=2, sp=True)
    first, second = (ranks.run(deterministic_run, where, EXPERTS, num_ranks=2)[0] for _ in range(2))
    assert first["mode"] is True
    assert first["variables"] == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert first["curve"] == second["curve"]
    usual = ranks.run(run_layout, where, OBJECTIVE, EXPERTS, 3, num_ranks=2)[0]
    assert first["curve"][-1]["loss"] == pytest.approx(usual["curve"][-1]["loss"], rel=1e-6)


def bf16_gradients(in_fp32: bool) -> dict[str, Any]:
    """Kind and size of the gradient buffers of bf16 weights on DP2, and the reduced gradient."""
    from tiny_run import micro_batches

    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import train_step

    where = layout("", 2, grad_reduce_in_fp32=in_fp32)
    with opened_model(where.parallel, MODEL, OBJECTIVE, precision="bf16") as opened:
        chunks, parallel = opened.chunks, opened.parallel
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(lr=1e-3), overlap_param_gather=False)
        setup = opened.pass_of(wrapped)
        batches = micro_batches(where, parallel, 0, MODEL.seq_length, documents=False)
        norm = train_step(setup, optimizer, batches)
        [buffer] = wrapped[0].buffers
        return {"dtype": str(buffer.grad_dtype), "norm": norm, **setup.metrics.reduce()}


def test_gradients_in_bf16(ranks: RankPool) -> None:
    """Half the bytes; each of the sums is rounded to 8 bits."""
    exact, rounded = (ranks.run(bf16_gradients, kind, num_ranks=2)[0] for kind in (True, False))
    assert (exact["dtype"], rounded["dtype"]) == ("torch.float32", "torch.bfloat16")
    assert rounded["loss"] == exact["loss"]
    assert rounded["norm"] != exact["norm"]
    assert rounded["norm"] == pytest.approx(exact["norm"], rel=0.01)
