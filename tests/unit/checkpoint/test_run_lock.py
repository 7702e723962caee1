"""One job in a run directory: the second is refused, a dead one holds nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dlm.checkpoint.run_lock import LOCK_NAME, Owner, RunLock, read_owner

HOLD = """
import sys, time
from pathlib import Path
from megatron_dlm.checkpoint.run_lock import RunLock
with RunLock(Path(sys.argv[1]), heartbeat_seconds=0.05):
    print("held", flush=True)
    {then}
"""
ROOT = Path(__file__).parents[3]


def start_holder(directory: Path, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Another process that has the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_holder(tmp_path)
    yield process
    process.kill()
    process.wait()


def leave_record(directory: Path, **changes: str | int) -> Path:
    """What a job that was killed leaves behind."""
    owner = Owner(socket.gethostname(), 1, "2026-01-01T00:00:00+00:00", None, "token")
    path = directory / LOCK_NAME
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner, **changes))))
    return path


def test_the_second_job_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in use by process") as caught, RunLock(tmp_path):
        pass
    message = str(caught.value)
    owner = read_owner(tmp_path / LOCK_NAME)
    assert owner is not None
    assert message == (
        f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since "
        f"{owner.since}; wait for that job or end it, or choose another train.output_dir"
    )
    assert read_owner(tmp_path / LOCK_NAME) == owner  # the refused one changed nothing


def test_free_after_the_end_and_after_kill_9(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert read_owner(tmp_path / LOCK_NAME) is not None
    with RunLock(tmp_path, heartbeat_seconds=1000.0):  # to wait for one would be a timeout
        pass
    assert (tmp_path / LOCK_NAME).read_text() == ""
    with RunLock(tmp_path):
        pass


def test_a_child_of_a_killed_job_does_not_hold_it(tmp_path: Path) -> None:
    """The writer of an asynchronous save is forked and may live a little longer."""
    process = start_holder(
        tmp_path, "import os; child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_requeued_on_another_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record of a vanished host stands still: after a while it is of a dead job."""
    leave_record(tmp_path, host="node17", pid=4242)
    start = time.monotonic()
    with RunLock(tmp_path, heartbeat_seconds=0.1):
        assert time.monotonic() - start >= 0.3
        owner = read_owner(tmp_path / LOCK_NAME)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert "process 4242 on node17 since 2026" in capsys.readouterr().out


def test_a_living_job_on_another_node_without_common_locks(tmp_path: Path) -> None:
    """flock succeeds here, but somebody renews the record."""
    path = leave_record(tmp_path, host="node17", pid=4242, job="99")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with (
            pytest.raises(ValueError, match="in use by process 4242 of job 99 on node17"),
            RunLock(tmp_path, heartbeat_seconds=0.5),
        ):
            pass
    finally:
        ended.set()
        heart.join()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leave_record(tmp_path, pid=os.getppid())
    with pytest.raises(ValueError, match="in use by process"), RunLock(tmp_path):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave_record(tmp_path, pid=ended.pid)
    with RunLock(tmp_path):
        owner = read_owner(tmp_path / LOCK_NAME)
        assert owner is not None
        assert owner.pid == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "\x00\x00"])
def test_a_garbled_record_is_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with RunLock(tmp_path):
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/run is not writable \(Not a directory\); choose"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass
