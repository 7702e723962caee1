"""kill -9, stop signals and failing disks: the run goes on with the numbers it would have had."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from command_line import (
    Job,
    arguments,
    assert_same_curves,
    latest,
    metrics,
    published,
    run_here,
    start,
    start_ranks,
)
from tiny_corpus import TinyCorpus

# The rank in front of which it stands can write no file larger than 100 KiB: a full disk.
SMALL_FILES_ONLY = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"]
TWO_TENSOR_RANKS = {"parallel__tensor_model_parallel_size": 2}
# Long enough to be interrupted wherever the test wants; the schedule follows train.steps.
LONG = {"train__steps": 2000, "schedule__kind": "constant"}


def test_killed_on_four_ranks_and_resumed_on_one(
    tiny_corpus: TinyCorpus, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run)
    layout = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]
    flags = [f"--parallel.{size}" for size in layout]
    jobs = start_ranks([*command, *flags], tmp_path / "four", num_ranks=4)
    jobs[0].wait_for(lambda: latest(run) >= 8)
    for job in jobs:
        job.kill()
    taken = max(metrics(run))
    assert 8 <= taken < 24, "killed in the middle"
    assert run_here(command) == 0
    assert_same_curves(whole_run, run)
    log = (run / "train.log").read_text()
    assert f"continuing from {run}/checkpoints/iter_" in log


def test_killed_during_a_save(
    tiny_corpus: TinyCorpus,
    whole_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run)
    job = start(command, tmp_path / "first")
    job.wait_for(lambda: latest(run) == 4)
    interrupted = freeze_in_a_save(job, run)
    job.kill()
    before = latest(run)
    assert published(run)[-1] == before < int(interrupted.name[5:12])

    assert run_here(command) == 0
    output = capsys.readouterr().out
    assert f"warning: ignoring {interrupted}: the save was interrupted" in output
    assert f"continuing from {run}/checkpoints/iter_{before:07d}" in output
    assert not interrupted.exists()
    assert_same_curves(whole_run, run, tolerance=0)


def freeze_in_a_save(job: Job, run: Path) -> Path:
    """Stop the process while its next unfinished checkpoint is on disk; returns that directory."""
    found: list[Path] = []

    def stopped_inside() -> bool:
        if not list((run / "checkpoints").glob("*.unfinished")):
            return False
        os.kill(job.process.pid, signal.SIGSTOP)
        while set(states_of_threads(job.process.pid)) - {"T"}:
            time.sleep(0.001)
        found[:] = (run / "checkpoints").glob("iter_*.unfinished")
        if not found:  # renamed in the meantime: the next one
            os.kill(job.process.pid, signal.SIGCONT)
        return bool(found)

    job.wait_for(stopped_inside, interval=0.0)
    return found[0]


def states_of_threads(process: int) -> list[str]:
    """A letter each, as in `man proc_pid_stat`; none of threads that end meanwhile."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_text().rpartition(")")[2].split()[0])
    return found


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_stop_signal_to_one_of_two_ranks(
    name: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, checkpoint__interval_steps=1000, **LONG)
    jobs = start_ranks(command, tmp_path / "first")
    jobs[0].wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
    os.kill(jobs[1].process.pid, signal.Signals[name])
    for ended in [job.end() for job in jobs]:
        assert ended.code == 0, ended.errors
        assert ended.errors == ""
    step = latest(run)
    assert published(run) == [step] == [max(metrics(run))]
    assert f"{name}: saved; the same command goes on from here" in (run / "train.log").read_text()

    steps = step + 4
    continued = [*command, f"--train.steps={steps}", "--validation.interval_steps=1000"]
    assert run_here(continued) == 0
    whole = tmp_path / "whole"
    assert run_here([*continued, f"--train.output_dir={whole}"]) == 0
    assert_same_curves(whole, run)


def test_sigterm_to_torchrun_and_to_the_whole_process_group_in_a_save(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """torchrun itself ends with 1 when it is signalled; what counts is that its ranks have saved.

    The second run shows that a signal to the writers of a save too harms nothing.
    """
    run = tmp_path / "run"
    job = start(arguments(tiny_corpus, run, **LONG), tmp_path / "torchrun", num_ranks=2)
    job.wait_for(lambda: latest(run) >= 4)
    os.kill(job.process.pid, signal.SIGTERM)
    job.end()
    assert published(run)[-1] == latest(run) == max(metrics(run))
    assert "SIGTERM: saved; the same command goes on" in (run / "train.log").read_text()

    command = arguments(tiny_corpus, run, **LONG, checkpoint__interval_steps=2)
    job = start(command, tmp_path / "alone")
    job.wait_for(lambda: bool(list((run / "checkpoints").glob("iter_*.unfinished"))))
    os.killpg(job.process.pid, signal.SIGTERM)
    ended = job.end()
    assert ended.code == 0, ended.errors
    assert published(run)[-1] == latest(run) == max(metrics(run))


def test_nothing_outlives_a_killed_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """kill -9 of the one process that the user knows of leaves no helper process behind."""
    run = tmp_path / "run"
    job = start(arguments(tiny_corpus, run, **LONG, checkpoint__interval_steps=500), tmp_path / "a")
    job.wait_for(lambda: (run / "metrics.jsonl").exists())
    assert job.workers() == []
    job.kill()


def test_full_disk_on_one_of_two_ranks(
    tiny_corpus: TinyCorpus, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run)
    assert run_here([*command, "--train.steps=4", "--schedule.kind=constant"]) == 0
    kept = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    command = arguments(tiny_corpus, run, **TWO_TENSOR_RANKS, schedule__kind="constant")
    jobs = start_ranks(command, tmp_path / "full", wrappers={1: SMALL_FILES_ONLY})
    first, second = [job.end() for job in jobs]
    assert (first.code, second.code) == (2, 2)
    assert len(first.error_lines()) == 1
    assert second.error_lines() == []
    assert "Traceback" not in first.errors + second.errors
    for part in (f"{run}/checkpoints", "could not be written", "rank 1", "free disk space"):
        assert part in first.error_lines()[0]
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert latest(run) == 4
    assert published(run) == [4]
    assert run_here([*command, "--parallel.tensor_model_parallel_size=1"]) == 0
    assert published(run)[-1] == latest(run) == 24


def test_disk_too_full_for_a_checkpoint(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of 16 MB: refused before anything is written, naming both sizes."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=16m tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        assert run_here(arguments(tiny_corpus, mount / "run", train__steps=4)) == 2
        error = capsys.readouterr().err
        assert f"{mount}/run/checkpoints: 0.02 GB are free" in error
        assert published(mount / "run") == []
        assert list(metrics(mount / "run")) == [1, 2, 3, 4]
    finally:
        os.system(f"umount {mount}")


def test_divergence_stops_every_rank_and_keeps_the_last_good_checkpoint(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"train__steps": 24, "checkpoint__interval_steps": 1, "optimizer__clip_grad": 0.0}
    command = arguments(tiny_corpus, run, **changes, optimizer__lr=1e30)
    ends = [job.end() for job in start_ranks(command, tmp_path / "log")]
    assert [ended.code for ended in ends] == [2, 2]
    (line,) = ends[0].error_lines()
    assert ends[1].error_lines() == []
    step = max(metrics(run)) + 1
    assert f"at step {step};" in line
    assert "optimizer.lr" in line
    assert latest(run) == step - 1
    assert published(run) == list(range(1, step))
    # Loadable: it ends in the same way at the same step, without taking an earlier one again.
    assert run_here(command) == 2
    assert max(metrics(run)) == step - 1
    assert (
        f"continuing from {run}/checkpoints/iter_{step - 1:07d}" in (run / "train.log").read_text()
    )


def test_divergence_does_not_lose_the_asynchronous_save_under_way(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"checkpoint__interval_steps": 1, "checkpoint__asynchronous": True}
    command = arguments(tiny_corpus, tmp_path / "run", optimizer__lr=1e30, **changes)
    assert run_here(command) == 2
    last_good = max(metrics(tmp_path / "run"))
    assert f"at step {last_good + 1};" in capsys.readouterr().err
    assert published(tmp_path / "run")[-1] == latest(tmp_path / "run") == last_good
