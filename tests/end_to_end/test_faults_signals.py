"""Stop signals at the worst moments: before the first step, in validation, and again and again."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

from megatron_dlm.training.status import Status, read_status

LONG = {"train__steps": 5000, "schedule__kind": "constant"}


def catches(job: Job, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{job.process.pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def status_of(run: Path) -> Status:
    status = read_status(run)
    assert status is not None
    return status


def send_again_and_again(job: Job, number: signal.Signals) -> threading.Event:
    """Until the event is set: what an impatient user, torchrun and Slurm together do."""
    is_over = threading.Event()

    def send() -> None:
        while not is_over.wait(0.05) and job.process.poll() is None:
            os.kill(job.process.pid, number)

    threading.Thread(target=send, daemon=True).start()
    return is_over


def test_from_the_first_moment_signals_stop_a_run_without_harm(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Sent before torch is imported, and every 50 ms until the process is gone."""
    run = tmp_path / "run"
    job = start(arguments(tiny_corpus, run, **LONG), tmp_path / "log", imports=True)
    job.wait_for(lambda: catches(job, signal.SIGUSR1))
    is_over = send_again_and_again(job, signal.SIGUSR1)
    ended = job.end()
    is_over.set()
    assert (ended.code, ended.errors) == (0, "")
    assert "SIGUSR1: stopped before the first step; the same command goes on" in ended.output
    status = status_of(run)
    assert (status.state, status.step, status.reason) == ("preempted", 0, "SIGUSR1")
    assert published(run) == []
    assert not (run / "metrics.jsonl").exists()


def test_signal_to_one_rank_before_the_first_step_stops_both(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """While it continues from a checkpoint, which stays the newest."""
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run)
    constant = "--schedule.kind=constant"
    assert run_here([*command, constant, "--train.steps=4"]) == 0
    jobs = start_ranks([*command, constant], tmp_path / "log", imports=True)
    jobs[1].wait_for(lambda: catches(jobs[1], signal.SIGTERM))
    os.kill(jobs[1].process.pid, signal.SIGTERM)
    for ended in [job.end() for job in jobs]:
        assert (ended.code, ended.errors) == (0, "")
    status = status_of(run)
    assert (status.state, status.step, status.reason) == ("preempted", 4, "SIGTERM")
    assert published(run) == [4]
    assert list(metrics(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_validation_under_way_is_put_off_and_comes_first_the_next_time(
    num_ranks: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """In the middle of a run, and again after the last step."""
    changes: dict[str, Any] = {"validation__num_samples": 200, "validation__interval_steps": 3}
    changes |= {"train__steps": 6, "checkpoint__interval_steps": 5, "schedule__kind": "constant"}
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = arguments(tiny_corpus, run, **changes)
    for step in (3, 6):
        jobs = start_ranks(command, tmp_path / f"stop_{step}", num_ranks=num_ranks)
        jobs[0].wait_for(lambda: last_report(run) == (step, "train"))  # noqa: B023 - in this round
        os.kill(jobs[-1].process.pid, signal.SIGTERM)
        assert [job.end().code for job in jobs] == [0] * num_ranks
        status = status_of(run)
        assert (status.state, status.step, status.reason) == ("preempted", step, "SIGTERM")
        assert latest(run) == step
        assert step not in metrics(run, "valid"), "the validation came to its end: use more windows"
        note = f"SIGTERM: the validation after step {step} waits for the next start"
        assert note in (run / "train.log").read_text()
        if step == 3:  # the next start dies after that validation, before it has saved anything
            jobs = start_ranks(command, tmp_path / "killed", num_ranks=num_ranks)
            jobs[0].wait_for(lambda: 3 in metrics(run, "valid"))
            for job in jobs:
                job.kill()
    for job in start_ranks(command, tmp_path / "rest", num_ranks=num_ranks):
        assert job.end().code == 0
    assert status_of(run).state == "finished"
    for job in start_ranks(
        arguments(tiny_corpus, whole, **changes), tmp_path / "whole_log", num_ranks=num_ranks
    ):
        assert job.end().code == 0
    assert list(metrics(run, "valid")) == [3, 6]
    assert_same_curves(whole, run, tolerance=0)


def last_report(run: Path) -> tuple[int, str] | None:
    """Step and split of the last line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return None
    entry = json.loads(lines[-1])
    return entry["step"], entry["split"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_signals_in_validation_and_saves_all_the_time(
    asynchronous: bool, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """A run that validates and saves after every step, stopped twice by a hail of signals."""
    run = tmp_path / "run"
    changes: dict[str, Any] = {**LONG, "validation__interval_steps": 1}
    changes |= {"checkpoint__interval_steps": 1, "checkpoint__asynchronous": asynchronous}
    command = arguments(tiny_corpus, run, **changes)
    moments: list[Callable[[], bool]] = [
        lambda: in_validation(run),
        lambda: bool(list((run / "checkpoints").glob("*.unfinished"))),
    ]
    for moment in moments:
        job = start(command, tmp_path / "log")
        process = job.process.pid
        # Not what the start before has left behind.
        job.wait_for(lambda process=process: status_of_process(run) == process)
        job.wait_for(moment)
        is_over = send_again_and_again(job, signal.SIGTERM)
        ended = job.end()
        is_over.set()
        assert (ended.code, ended.errors) == (0, "")
        status = status_of(run)
        assert (status.state, status.reason) == ("preempted", "SIGTERM")
        assert status.step == latest(run) == published(run)[-1] == max(metrics(run))
    steps = status_of(run).step + 2
    whole = tmp_path / "whole"
    longer = [*command, f"--train.steps={steps}"]
    assert run_here(longer) == run_here([*longer, f"--train.output_dir={whole}"]) == 0
    assert_same_curves(whole, run, tolerance=0)
    assert status_of(run).state == "finished"


def status_of_process(run: Path) -> int | None:
    status = read_status(run)
    return None if status is None else status.pid


def in_validation(run: Path) -> bool:
    """The last report is one of training: now it validates."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return False
    lines = path.read_text().splitlines()
    return bool(lines) and '"split":"train"' in lines[-1]
