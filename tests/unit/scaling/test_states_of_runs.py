"""How a run stands, by its status.json and by who has its folder: real locks, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dlm.checkpoint.run_lock import LOCK_NAME, RunLock
from megatron_dlm.scaling.run_state import RunState, owner_of, state_of
from megatron_dlm.training.status import write_status

_TRAINS = """
import sys, time
from pathlib import Path
from megatron_dlm.checkpoint.run_lock import RunLock
from megatron_dlm.training.status import write_status
with RunLock(Path(sys.argv[1])):
    write_status(Path(sys.argv[1]), "running", 2)
    print("begun", flush=True)
    time.sleep(600)
"""


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the folder, as one that trains does."""
    command = [sys.executable, "-c", _TRAINS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_run_that_was_killed_does_not_run(tmp_path: Path) -> None:
    assert state_of(tmp_path) == RunState("not begun")
    with training(tmp_path) as process:
        assert state_of(tmp_path) == RunState("running", 2)
        owner = owner_of(tmp_path)
        assert owner is not None
        assert owner.pid == process.pid
        # Bytes that no reader of text takes for a line end, then a line that is still written.
        lines = [{"step": 5, "split": "train", "text": "\u2028"}, {"step": 6, "split": "train"}]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(content + '{"step": 7, "spl')
        assert state_of(tmp_path) == RunState("running", 6)
        process.kill()
        process.wait()
        found = state_of(tmp_path)
    assert (found.state, found.step) == ("killed", 6)
    assert "ended without a word" in found.reason
    assert owner_of(tmp_path) is None


def test_what_a_run_says_of_its_end_stands(tmp_path: Path) -> None:
    for state in ("finished", "preempted", "failed"):
        write_status(tmp_path, state, 9, "SIGTERM")
        assert state_of(tmp_path) == RunState(state, 9, "SIGTERM")


def test_a_run_that_was_started_again_runs(tmp_path: Path) -> None:
    """It holds the folder before it has written a status of its own."""
    write_status(tmp_path, "failed", 9, "out of memory")
    with RunLock(tmp_path):
        assert state_of(tmp_path) == RunState("running", 9)
    assert state_of(tmp_path).state == "failed"


def test_of_another_host_the_signs_of_life_count(tmp_path: Path) -> None:
    """Some file systems have no locks, or locks within one host."""
    write_status(tmp_path, "running", 3)
    record = {"host": "node-9", "pid": os.getpid(), "since": "noon", "job": "7", "token": "x"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(record))
    assert state_of(tmp_path).state == "running"
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / LOCK_NAME, (an_hour_ago, an_hour_ago))
    assert state_of(tmp_path).state == "killed"
