"""Checkpoints on disk: damaged, hostile, asynchronous, retained."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import arguments, assert_same_curves, latest, published, run_here, start_ranks
from forged_manifest import forge
from tiny_corpus import TinyCorpus


def checkpoint_files(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"iter_{step:07d}"


@pytest.fixture(scope="module")
def eight_steps(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("eight") / "run"
    changes = {"schedule__kind": "constant", "train__steps": 8}
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    assert published(run) == [4, 8]
    return run


@pytest.fixture(scope="module")
def twelve_steps(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("twelve") / "run"
    changes = {"schedule__kind": "constant", "train__steps": 12}
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    return run


@pytest.fixture
def two_checkpoints(
    eight_steps: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> tuple[Path, list[str]]:
    """A run of 8 steps with checkpoints at 4 and 8, and the command that goes on to 12."""
    run = tmp_path / "run"
    shutil.copytree(eight_steps, run)
    return run, arguments(tiny_corpus, run, schedule__kind="constant", train__steps=12)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "a flipped bit"])
def test_damaged_checkpoint_is_passed_over(
    damage: str,
    two_checkpoints: tuple[Path, list[str]],
    twelve_steps: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, command = two_checkpoints
    newest = checkpoint_files(run, 8)
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "missing":
        largest.unlink()
    elif damage == "a flipped bit":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00")
    else:
        (newest / "megatron_dlm.json").unlink()
    assert run_here(command) == 0
    output = capsys.readouterr().out
    assert f"warning: ignoring {newest}: " in output
    assert (largest.name if damage != "no manifest" else "megatron_dlm.json") in output
    assert f"continuing from {checkpoint_files(run, 4)}" in output
    assert published(run) == [4, 8, 12]
    assert latest(run) == 12
    assert_same_curves(twelve_steps, run, tolerance=0)


class RunsCode:
    """Unpickling it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_hostile_pickle_is_refused(
    name: str,
    two_checkpoints: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, command = two_checkpoints
    mark = tmp_path / "code_has_run"
    path = checkpoint_files(run, 8) / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(RunsCode(mark)))
    else:
        torch.save({"train_state": RunsCode(mark)}, path)
    forge(path.parent)
    assert run_here(command) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("megatron-dlm ")]
    assert str(path.parent) in line
    assert "Traceback" not in errors
    assert not mark.exists()
    assert published(run) == [4, 8]


def test_scrambled_weights_are_an_error_not_a_start_from_scratch(
    two_checkpoints: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes and sums are forged: reading fails, the user is told which checkpoint to move away."""
    run, command = two_checkpoints
    for path in checkpoint_files(run, 8).glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    assert run_here([*command, "--checkpoint.verify=sizes"]) == 2
    forge(checkpoint_files(run, 8))
    capsys.readouterr()
    assert run_here(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{checkpoint_files(run, 8)} cannot be read" in line
    assert "move it away" in line


def test_a_run_whose_every_checkpoint_is_damaged_stops(
    two_checkpoints: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, command = two_checkpoints
    (checkpoint_files(run, 4) / "common.pt").unlink()
    (checkpoint_files(run, 8) / ".metadata").write_bytes(b"")
    assert run_here(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("none is sound", "common.pt", ".metadata", "train.resume never"):
        assert part in line
    assert run_here([*command, "--train.resume=never", "--train.steps=4"]) == 0
    assert published(run) == [4]


def test_asynchronous_saves_publish_and_resume(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """On two ranks with sharded optimizer state, resumed on one; equal to a synchronous run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"schedule__kind": "constant", "checkpoint__interval_steps": 3, "train__steps": 12}
    command = [*arguments(tiny_corpus, run, **changes), "--checkpoint.asynchronous=true"]
    jobs = start_ranks([*command, "--train.steps=8"], tmp_path / "log")
    for ended in [job.end() for job in jobs]:
        assert ended.code == 0, ended.errors
        assert ended.errors == ""
    assert published(run) == [3, 6, 8]
    assert latest(run) == 8
    assert list((run / "checkpoints").glob("*.unfinished")) == []
    assert run_here(command) == 0
    assert published(run) == [3, 6, 8, 9, 12]
    assert run_here(arguments(tiny_corpus, whole, **changes)) == 0
    assert_same_curves(whole, run)


def test_retention(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    changes = {
        "train__steps": 12,
        "checkpoint__interval_steps": 2,
        "checkpoint__keep_last": 2,
        "checkpoint__keep_every_steps": 4,
    }
    assert run_here(arguments(tiny_corpus, tmp_path / "run", **changes)) == 0
    assert published(tmp_path / "run") == [4, 8, 10, 12]
