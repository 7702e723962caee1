"""Checkpoints while things go wrong: kill -9, two jobs, full and read-only disks, permissions."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from command_line import (
    arguments,
    assert_same_curves,
    latest,
    metrics,
    published,
    run_here,
    start,
    start_ranks,
)
from fault_runs import processes_of
from tiny_corpus import TinyCorpus

from megatron_dlm.checkpoint.run_lock import LOCK_NAME

SMALL_FILES_ONLY = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]
LONG = {"train__steps": 2000, "schedule__kind": "constant"}


def test_killed_in_asynchronous_saves(
    tiny_corpus: TinyCorpus, whole_run: Path, tmp_path: Path
) -> None:
    """kill -9 of everything at drawn moments, while a save is under way after almost every step."""
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, checkpoint__interval_steps=1, checkpoint__keep_last=2)
    command.append("--checkpoint.asynchronous=true")
    draw = random.Random(11)
    for attempt in range(3):
        reached = latest(run)
        job = start(command, tmp_path / f"attempt_{attempt}")
        job.wait_for(lambda: latest(run) >= reached + 2)  # noqa: B023 - called in this round
        time.sleep(draw.uniform(0, 0.1))
        job.kill()
        assert reached + 2 <= latest(run) < 24, "killed in the middle"
    assert run_here(command) == 0
    assert_same_curves(whole_run, run, tolerance=0)
    assert published(run) == [23, 24]
    assert list((run / "checkpoints").glob("*.unfinished")) == []
    assert run_here(["checkpoint", "verify", f"--checkpoint={run}"]) == 0


def test_no_writer_outlives_its_rank(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """kill -9 of a rank alone while its fork writes, or has only just begun to be."""
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, **LONG, checkpoint__interval_steps=1)
    command += ["--checkpoint.asynchronous=true", "--checkpoint.keep_last=1"]
    for attempt, seconds in enumerate((0.0, 0.01)):
        job = start(command, tmp_path / f"attempt_{attempt}")
        session = job.process.pid
        reached = latest(run)
        job.wait_for(lambda: latest(run) > reached)  # noqa: B023 - called in this round
        job.wait_for(lambda: len(processes_of([session])) > 1)  # noqa: B023
        time.sleep(seconds)
        job.process.kill()
        job.process.wait()
        deadline = time.monotonic() + 10
        while processes_of([session]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes_of([session]) == []


def test_full_disk_in_an_asynchronous_save(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, schedule__kind="constant", train__steps=12)
    assert run_here([*command, "--train.steps=4"]) == 0
    asynchronous = [*command, "--checkpoint.asynchronous=true"]
    (job,) = start_ranks(
        asynchronous, tmp_path / "full", num_ranks=1, wrappers={0: SMALL_FILES_ONLY}
    )
    ended = job.end()
    assert ended.code == 2
    assert "Traceback" not in ended.errors
    (line,) = ended.error_lines()
    assert "could not be written" in line
    assert "free disk space" in line
    assert published(run) == [4]
    assert run_here(asynchronous) == 0
    assert published(run) == [4, 8, 12]


def test_two_jobs_in_one_run_directory(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, **LONG)
    job = start(command, tmp_path / "first")
    job.wait_for(lambda: latest(run) >= 4)
    for refused in (command, [*command, "--train.resume=never"]):
        capsys.readouterr()
        assert run_here(refused) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run} is in use by process {job.process.pid} on {os.uname().nodename}" in line
        assert "wait for that job or end it" in line
    assert run_here(["checkpoint", "prune", f"--run={run}"]) == 2
    at_refusal = max(metrics(run))
    job.wait_for(lambda: max(metrics(run)) > at_refusal + 2)  # the first job is undisturbed
    job.kill()
    steps = max(metrics(run)) + 2
    assert run_here([*command, f"--train.steps={steps}"]) == 0  # a dead job holds nothing
    assert latest(run) == steps
    assert (run / LOCK_NAME).read_text() == ""


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_users_umask_is_respected(mask: int, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = os.umask(mask)
    try:
        assert run_here(arguments(tiny_corpus, run, train__steps=4)) == 0
    finally:
        os.umask(before)
    files = [run, *run.rglob("*")]
    assert len(files) > 8
    for path in files:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, f"{path}: {mode:o}"


def test_a_read_only_file_system(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run can be read; to go on with it is refused in one line."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=512m tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        run = mount / "run"
        command = arguments(tiny_corpus, run, train__steps=4)
        assert run_here(command) == 0
        assert os.system(f"mount -o remount,ro {mount}") == 0
        capsys.readouterr()
        assert run_here(["checkpoint", "verify", f"--checkpoint={run}"]) == 0
        assert run_here(["checkpoint", "inspect", f"--checkpoint={run}"]) == 0
        for refused in (command, ["checkpoint", "prune", f"--run={run}"]):
            assert run_here(refused) == 2
            assert f"{run} is not writable" in capsys.readouterr().err
    finally:
        os.system(f"umount {mount}")


def test_average_and_train_from_it(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The command line makes it, training starts from it, and a model is loaded from it."""
    import torch

    from megatron_dlm.hf.load import load_model

    run, averaged = tmp_path / "run", tmp_path / "averaged"
    command = arguments(tiny_corpus, run, schedule__kind="constant", train__steps=12)
    assert run_here(command) == 0
    flags = [f"--run={run}", f"--output_dir={averaged}", "--last=3", "--kind=ema", "--decay=0.5"]
    assert run_here(["checkpoint", "average", *flags]) == 0

    states = [load_model(run, step=step).model.state_dict() for step in (4, 8, 12)]
    for name, values in load_model(averaged).model.state_dict().items():
        expected = sum(
            factor * state[name].double()
            for factor, state in zip((0.25, 0.25, 0.5), states, strict=True)
        )
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)

    assert run_here([*command, f"--train.output_dir={averaged}", "--train.steps=4"]) == 0
    assert published(averaged) == [0, 4]
    assert metrics(averaged)[1]["loss"] < metrics(run)[1]["loss"]
