"""Ten steps equal five, a stop, and five more: bit for bit, or within rounding across layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool
from resume_run import checkpoint_tensors, train_in_ranks, write_shards

TP2_PP2 = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2"]
DP2 = ["--parallel.tensor_model_parallel_size=1"]
LAPROP = ["--optimizer.kind=laprop", "--optimizer.adam_beta2=0.99"]
COMPLETEP = [
    "--optimizer.parametrization=completep",
    "--optimizer.lr=0.02",
    # Divided by 32 * 4, still above gradients that are rounding noise: these get small updates.
    "--optimizer.adam_eps=1e-3",
    "--model.untie_embeddings_and_output_weights=true",
    "--model.output_init_std=0",
    "--model.output_multiplier=16",
]
BASE = {
    "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
    "checkpoint": {"interval_steps": 5, "keep_last": 0},
    "validation": {"interval_steps": 5, "num_samples": 6},
    # 3 does not divide 5: the checkpoint is taken in the middle of a logging interval.
    "logging": {"interval_steps": 3, "tensorboard": False},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train(
    ranks: RankPool, shards: Path, run: Path, flags: Sequence[str] = (), *, num_ranks: int = 1
) -> dict[tuple[int, str], dict[str, Any]]:
    """The metrics of a run (continued if `run` holds one), by (step, split)."""
    ranks.run(train_in_ranks, BASE, shards, run, list(flags), num_ranks=num_ranks)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entries = {(entry["step"], entry["split"]): entry for entry in map(json.loads, lines)}
    assert len(entries) == len(lines), "a step was logged twice"
    return entries


def killed_after_five(whole: Path, target: Path) -> Path:
    """What a run killed at step 9 leaves: checkpoints up to 5, metrics up to 9."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "checkpoints" / "iter_0000010")
    lines = (target / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 10]
    assert any(json.loads(line)["step"] == 9 for line in kept)
    (target / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 10, "spl')
    return target


def final_tensors(ranks: RankPool, run: Path) -> dict[str, np.ndarray]:
    path = run / "checkpoints" / "iter_0000010"
    return ranks.run(checkpoint_tensors, str(path), num_ranks=1)[0]


def check_metrics(ours: dict[Any, Any], theirs: dict[Any, Any], *, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for place, entry in theirs.items():
        for name in ("loss", "nelbo", "grad_norm", "masked_share", "lr", "tokens"):
            if name in entry:
                wanted = pytest.approx(entry[name], rel=tolerance, abs=0)
                assert ours[place][name] == wanted, f"{place} {name}"


CASES = {
    "autoregressive": ["--objective.kind=autoregressive"],
    "masked": ["--objective.kind=masked"],
    "dropout": ["--model.hidden_dropout=0.1", "--model.attention_dropout=0.1"],
    "bf16": ["--train.precision=bf16"],
    "laprop": [*LAPROP, *COMPLETEP],
    "laprop bf16": [*LAPROP, "--train.precision=bf16"],
}


@pytest.mark.parametrize("case", CASES)
def test_bit_equal_on_one_layout(ranks: RankPool, shards: Path, tmp_path: Path, case: str) -> None:
    flags = [*CASES[case], "--parallel.tensor_model_parallel_size=2"]
    whole = train(ranks, shards, tmp_path / "whole", flags, num_ranks=2)
    run = killed_after_five(tmp_path / "whole", tmp_path / "resumed")
    resumed = train(ranks, shards, run, flags, num_ranks=2)
    check_metrics(resumed, whole, tolerance=0)
    ours, theirs = final_tensors(ranks, run), final_tensors(ranks, tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in theirs)
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "tolerance"), [([], 1e-5), ([*LAPROP, *COMPLETEP], 1e-4)], ids=["adamw", "laprop"]
)
def test_across_layouts_with_optimizer_state(
    ranks: RankPool, shards: Path, tmp_path: Path, flags: list[str], tolerance: float
) -> None:
    """One rank, then TP2 x PP2 from step 5, then DP2 from step 5 of that, against one rank."""
    whole = train(ranks, shards, tmp_path / "whole", flags)
    split = killed_after_five(tmp_path / "whole", tmp_path / "split")
    four_ranks, two_ranks = [*flags, *TP2_PP2], [*flags, *DP2]
    check_metrics(train(ranks, shards, split, four_ranks, num_ranks=4), whole, tolerance=1e-5)
    # A checkpoint that was itself written by TP2 x PP2.
    four = tmp_path / "four"
    train(ranks, shards, four, four_ranks, num_ranks=4)
    data = killed_after_five(four, tmp_path / "data")
    check_metrics(train(ranks, shards, data, two_ranks, num_ranks=2), whole, tolerance=1e-5)
    ours, theirs = final_tensors(ranks, data), final_tensors(ranks, tmp_path / "whole")
    for name, values in theirs.items():
        atol = tolerance * np.abs(values).max()
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=atol, err_msg=name)


def test_cropped_steps_are_the_same_on_every_layout(
    ranks: RankPool, shards: Path, tmp_path: Path
) -> None:
    flags = [
        "--objective.variable_length_probability=0.7",
        "--objective.variable_length_multiple=4",
        "--logging.interval_steps=1",
    ]
    one = train(ranks, shards, tmp_path / "one", flags)
    split = [*flags, *TP2_PP2, "--parallel.sequence_parallel=true"]
    check_metrics(train(ranks, shards, tmp_path / "four", split, num_ranks=4), one, tolerance=1e-5)
    whole = train(ranks, shards, tmp_path / "whole", ["--logging.interval_steps=1"])
    norms = [[run[step, "train"]["grad_norm"] for step in range(1, 11)] for run in (one, whole)]
    assert norms[0] != norms[1], "no step was cropped"


def test_interleaved_pipeline_and_overlap_continue_on_one_rank(
    ranks: RankPool, shards: Path, tmp_path: Path
) -> None:
    whole = train(ranks, shards, tmp_path / "whole")
    flags = [
        "--parallel.pipeline_model_parallel_size=2",
        "--parallel.virtual_pipeline_model_parallel_size=2",
        "--parallel.overlap_grad_reduce=true",
        "--parallel.overlap_param_gather=true",
        "--train.micro_batch_size=1",
        "--checkpoint.asynchronous=true",
    ]
    check_metrics(
        train(ranks, shards, tmp_path / "four", flags, num_ranks=4), whole, tolerance=1e-5
    )
    run = killed_after_five(tmp_path / "four", tmp_path / "one")
    check_metrics(train(ranks, shards, run), whole, tolerance=1e-5)


def test_a_finished_run_does_nothing(ranks: RankPool, shards: Path, tmp_path: Path) -> None:
    first = train(ranks, shards, tmp_path / "run")
    assert train(ranks, shards, tmp_path / "run") == first


def test_longer_run_goes_on(ranks: RankPool, shards: Path, tmp_path: Path) -> None:
    """train.steps may grow: the first steps are untouched, the rest is as in one long run."""
    constant = ["--schedule.kind=constant"]
    train(ranks, shards, tmp_path / "run", constant)
    longer = train(ranks, shards, tmp_path / "run", [*constant, "--train.steps=12"])
    whole = train(ranks, shards, tmp_path / "whole", [*constant, "--train.steps=12"])
    assert longer[(12, "valid")]["nelbo"] == whole[(12, "valid")]["nelbo"]
    assert longer[(12, "train")]["grad_norm"] == whole[(12, "train")]["grad_norm"]


def test_other_shards_are_refused(ranks: RankPool, shards: Path, tmp_path: Path) -> None:
    train(ranks, shards, tmp_path / "run")
    other = write_shards(tmp_path / "other", seed=4)
    with pytest.raises(AssertionError, match="iter_0000010 was trained on other data"):
        train(ranks, other, tmp_path / "run", ["--train.steps=12"])
