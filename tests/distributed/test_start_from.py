"""A run that goes on from another run's checkpoint: bit for bit the run that never left."""

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

BASE = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "schedule": {"kind": "constant"},
    "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    "checkpoint": {"interval_steps": 5, "keep_last": 0},
    "validation": {"interval_steps": 5, "num_samples": 6},
    # 3 does not divide 5: the checkpoint is taken in the middle of a logging interval.
    "logging": {"interval_steps": 3, "tensorboard": False},
}
COOLDOWN = ["--schedule.kind=wsd", "--schedule.decay_fraction=0.5", "--schedule.min_lr_ratio=0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def constant(ranks: RankPool, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps at a constant rate; checkpoints after 5 and 10."""
    run = tmp_path_factory.mktemp("runs") / "constant"
    train(ranks, shards, run)
    return run


def train(ranks: RankPool, shards: Path, run: Path, flags: Sequence[str] = ()) -> None:
    ranks.run(train_in_ranks, BASE, shards, run, list(flags), num_ranks=1)


def reports(run: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """All but the times, by (step, split)."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        timeless = {key: value for key, value in entry.items() if "second" not in key}
        found[entry["step"], entry["split"]] = timeless
    return found


def tensors(ranks: RankPool, run: Path) -> dict[str, np.ndarray]:
    return ranks.run(checkpoint_tensors, str(run / "checkpoints/iter_0000010"), num_ranks=1)[0]


def test_a_cooldown_from_a_checkpoint_is_the_run_that_decays(
    ranks: RankPool, shards: Path, constant: Path, tmp_path: Path
) -> None:
    train(ranks, shards, tmp_path / "whole", COOLDOWN)
    parent = shutil.copytree(constant, tmp_path / "constant")
    start = f"--train.start_from={parent / 'checkpoints/iter_0000005'}"
    branch = tmp_path / "branch"
    train(ranks, shards, branch, [*COOLDOWN, start])
    whole = reports(tmp_path / "whole")
    ours = reports(branch)
    assert set(ours) == {place for place in whole if place[0] > 5}
    for place, entry in ours.items():
        assert entry["loss"] == whole[place]["loss"]
        assert entry.get("lr") == whole[place].get("lr")
    for name, values in tensors(ranks, tmp_path / "whole").items():
        np.testing.assert_array_equal(tensors(ranks, branch)[name], values, err_msg=name)
    facts = json.loads((branch / "run.json").read_text())
    assert facts["resumed_from_step"] == 5

    # Killed at step 9: its own checkpoints come first, and the other run is not needed any more.
    train(ranks, shards, branch, [*COOLDOWN, start, "--train.steps=11"])
    shutil.rmtree(parent)
    train(ranks, shards, branch, [*COOLDOWN, start, "--train.steps=12"])
    assert json.loads((branch / "run.json").read_text())["resumed_from_step"] == 11


def test_the_run_directory_stands_for_its_newest(
    ranks: RankPool, shards: Path, constant: Path, tmp_path: Path
) -> None:
    train(ranks, shards, tmp_path / "on", [f"--train.start_from={constant}", "--train.steps=12"])
    assert min(step for step, _ in reports(tmp_path / "on")) == 12
    facts = json.loads((tmp_path / "on/run.json").read_text())
    assert facts["resumed_from_step"] == 10


@pytest.mark.parametrize(
    ("start", "flags", "message"),
    [
        ("nowhere", [], "train.start_from: nowhere is no directory"),
        ("{run}/checkpoints/iter_0000007", [], r"iter_0000007 is no directory"),
        (
            "{run}",
            ["--train.global_batch_size=4"],
            r"was made with train.global_batch_size 8, this run has 4: its step 10 would be",
        ),
        ("{run}", ["--model.hidden_size=64"], "hidden_size"),
        ("{run}", ["--optimizer.kind=laprop"], "holds moments of optimizer.kind adamw"),
    ],
)
def test_refused(
    ranks: RankPool,
    shards: Path,
    constant: Path,
    tmp_path: Path,
    *,
    start: str,
    flags: list[str],
    message: str,
) -> None:
    given = [f"--train.start_from={start.format(run=constant)}", *flags]
    with pytest.raises(Exception, match=message):
        train(ranks, shards, tmp_path / "refused", given)
    assert not (tmp_path / "refused" / "checkpoints").exists()
