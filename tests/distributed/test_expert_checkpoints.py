"""Checkpoints of models with experts go on at any number of expert-parallel ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool
from resume_run import checkpoint_tensors, write_shards
from test_resume import check_metrics, killed_after_five, train

EXPERTS = [
    "--objective.kind=masked",
    "--train.micro_batch_size=2",
    "--model.moe.num_experts=4",
    "--model.moe.ffn_hidden_size=48",
    "--model.moe.num_dense_layers=2",  # so that the first of two stages has no experts
    "--model.moe.seq_aux_loss_coeff=0.01",
    "--model.moe.shared_expert_ffn_hidden_size=32",
]
EP2 = [*EXPERTS, "--parallel.expert_model_parallel_size=2"]
TP2 = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
PP2 = ["--parallel.pipeline_model_parallel_size=2"]
# name -> flags and ranks
LAYOUTS: dict[str, tuple[list[str], int]] = {
    "EP1": (EXPERTS, 1),
    "EP1 x DP2": (EXPERTS, 2),
    "EP4": ([*EXPERTS, "--parallel.expert_model_parallel_size=4"], 4),
    "EP2 x DP4": (EP2, 4),
    "EP2 x TP2 + SP": ([*EP2, *TP2], 4),
    "EP2 x PP2": ([*EP2, *PP2], 4),
}
Metrics = dict[tuple[int, str], dict[str, Any]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(
    ranks: RankPool, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Metrics]:
    """Ten steps at EP2 without a stop."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train(ranks, shards, run, EP2, num_ranks=2)


def tensors(ranks: RankPool, run: Path, step: int = 10) -> dict[str, np.ndarray]:
    path = run / "checkpoints" / f"iter_{step:07d}"
    return ranks.run(checkpoint_tensors, str(path), num_ranks=1)[0]


def test_bit_equal_on_one_layout(
    ranks: RankPool, shards: Path, tmp_path: Path, whole: tuple[Path, Metrics]
) -> None:
    path, metrics = whole
    run = killed_after_five(path, tmp_path / "resumed")
    check_metrics(train(ranks, shards, run, EP2, num_ranks=2), metrics, tolerance=0)
    ours, theirs = tensors(ranks, run), tensors(ranks, path)
    assert ours.keys() == theirs.keys()
    moments = [name for name in theirs if "exp_avg_sq" in name and ".experts." in name]
    # Both matrices of the experts of 2 layers, each of 4 experts.
    assert [theirs[name].shape[0] for name in moments] == [4] * 4
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_to_another_layout_and_back(
    ranks: RankPool, shards: Path, tmp_path: Path, whole: tuple[Path, Metrics], name: str
) -> None:
    """EP2 until step 5, then with its moments another layout until 8, then EP2 again until 10."""
    path, metrics = whole
    flags, num_ranks = LAYOUTS[name]
    run = killed_after_five(path, tmp_path / "run")
    there = [*flags, "--checkpoint.interval_steps=8"]
    check_metrics(train(ranks, shards, run, there, num_ranks=num_ranks), metrics, tolerance=1e-6)
    compare(tensors(ranks, run), tensors(ranks, path))
    shutil.rmtree(run / "checkpoints" / "iter_0000010")
    check_metrics(train(ranks, shards, run, EP2, num_ranks=2), metrics, tolerance=1e-6)
    compare(tensors(ranks, run), tensors(ranks, path))


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        atol = 1e-5 * np.abs(values).max()
        np.testing.assert_allclose(ours[key], values, rtol=0, atol=atol, err_msg=key)
