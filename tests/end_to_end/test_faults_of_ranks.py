"""A rank that dies, fails, hangs or is slow: the others end (or go on) and say which one it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import START_SECONDS, Job, arguments, metrics, start, start_ranks
from tiny_corpus import TinyCorpus

from megatron_dlm.training.status import Status, read_status

LONG = {"train__steps": 5000, "schedule__kind": "constant", "checkpoint__interval_steps": 5000}
_FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
_HOST = socket.gethostname()
# From the fault to the end of all ranks; the lifeline itself takes about a second.
_SOON = 15.0


def status_of(run: Path) -> Status:
    status = read_status(run)
    assert status is not None
    return status


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["kind"] == kind]


def started(corpus: TinyCorpus, run: Path, log: Path, **changes: Any) -> list[Job]:
    """Two ranks in the middle of a run."""
    jobs = start_ranks(arguments(corpus, run, **{**LONG, **changes}), log)
    jobs[0].wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
    return jobs


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other_soon_and_is_named(
    victim: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    jobs = started(tiny_corpus, run, tmp_path / "log")
    dead, alive = jobs[victim], jobs[1 - victim]
    os.kill(dead.process.pid, signal.SIGKILL)
    ended = alive.end(_SOON)
    assert ended.code == 1
    assert len(ended.error_lines()) == 1, ended.errors
    culprit = f"rank {victim} on {_HOST} (pid {dead.process.pid}) died"
    assert f"error: {culprit}" in ended.error_lines()[0]
    status = status_of(run)
    assert status.state == "failed"
    assert status.reason is not None
    assert culprit in status.reason
    assert status.step >= 3
    if victim == 1:
        assert culprit in events_of(run, "end")[-1]["reason"]
    dead.process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_while_the_ranks_meet_ends_the_other_soon(
    victim: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """In the very first collective, whose own timeout is ten minutes here."""
    wrappers = {victim: [sys.executable, _FAULTY, "die", "0"]}
    jobs = start_ranks(
        arguments(tiny_corpus, tmp_path / "run", **LONG), tmp_path / "log", wrappers=wrappers
    )
    jobs[victim].process.wait(START_SECONDS)
    ended = jobs[1 - victim].end(_SOON)
    assert ended.code == 1
    assert "Traceback" not in ended.errors
    (line,) = ended.error_lines()
    assert f"rank {victim} on {_HOST} (pid {jobs[victim].process.pid}) died" in line


def test_exception_of_one_rank_is_named_by_the_other(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, **LONG)
    wrappers = {1: [sys.executable, _FAULTY, "raise", "7"]}
    jobs = start_ranks(command, tmp_path / "log", wrappers=wrappers)
    first, second = [job.end() for job in jobs]
    assert (first.code, second.code) == (1, 1)
    culprit = f"rank 1 on {_HOST} (pid {jobs[1].process.pid}) failed"
    expected = f"{culprit}: KeyError: 'the fault of the test'"
    assert first.error_lines() == [f"megatron-dlm train: error: {expected}"]
    assert "Traceback" not in first.errors
    assert "KeyError: 'the fault of the test'" in second.errors
    assert "Traceback" in second.errors
    status = status_of(run)
    assert (status.state, status.reason, status.step) == ("failed", expected, 6)


def test_exception_under_torchrun_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """kill -9 of one of torchrun's workers; torchrun itself reports it in its own words."""
    run = tmp_path / "run"
    job = start(arguments(tiny_corpus, run, **LONG), tmp_path / "log", num_ranks=2)
    job.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
    victim = job.workers()[1]
    os.kill(victim, signal.SIGKILL)
    assert job.end().code == 1
    status = status_of(run)
    assert status.state == "failed"
    assert f"rank 1 on {_HOST} (pid {victim}) died" in str(status.reason)


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_hang_is_ended_with_the_stacks_of_all_ranks(
    how: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """stopped: a process that does not answer at all; asleep: one that answers and does not go
    on."""
    run = tmp_path / "run"
    command = arguments(tiny_corpus, run, **LONG, recovery__hang_timeout_minutes=0.04)
    wrappers = {1: [sys.executable, _FAULTY, "sleep", "7"]} if how == "asleep" else {}
    jobs = start_ranks(command, tmp_path / "log", wrappers=wrappers)
    if how == "stopped":
        jobs[0].wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
        os.kill(jobs[1].process.pid, signal.SIGSTOP)
    first = jobs[0].end(60)
    assert first.code == 1
    reason = str(status_of(run).reason)
    assert status_of(run).state == "failed"
    assert re.match(
        r"step \d+ did not end in time \(recovery.hang_timeout_minutes is 0.04\)", reason
    )
    assert "train_step" in (run / "stacks" / "rank_0.txt").read_text()
    assert events_of(run, "hang") or events_of(run, "end")
    if how == "stopped":
        assert f"no answer from rank 1 on {_HOST} (pid {jobs[1].process.pid})" in reason
        os.kill(jobs[1].process.pid, signal.SIGCONT)
    else:
        assert "all ranks are in step 7" in reason
        assert "faulty_rank.py" in (run / "stacks" / "rank_1.txt").read_text()
    second = jobs[1].end()
    assert second.code == 1
    assert reason.split(";")[0] in second.errors


@contextlib.contextmanager
def slowed_down(process: int) -> Iterator[None]:
    """The process gets about a third of the time."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not is_over.wait(0.01):
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.04)
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_slow_rank_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"logging__interval_steps": 20, "recovery__straggler_factor": 2.0}
    command = arguments(tiny_corpus, run, **{**LONG, **changes})
    jobs = start_ranks(command, tmp_path / "log")
    jobs[0].wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 1)
    with slowed_down(jobs[1].process.pid):
        jobs[0].wait_for(lambda: any(e["rank"] == 1 for e in events_of(run, "straggler")))
    os.kill(jobs[0].process.pid, signal.SIGTERM)
    assert [job.end().code for job in jobs] == [0, 0]
    event = next(event for event in events_of(run, "straggler") if event["rank"] == 1)
    assert event["host"] == _HOST
    assert event["seconds"] > 2 * event["median_seconds"] > 0
    assert f"warning: rank 1 on {_HOST} is slow: " in (run / "train.log").read_text()
