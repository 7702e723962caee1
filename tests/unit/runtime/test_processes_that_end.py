"""Forked processes that do not outlive the one that forked them, whatever they are waiting for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dlm.runtime import processes

# The child waits for a lock that a thread of the parent held when it was forked.
_DEADLOCKED = """
import contextlib, os, sys, threading, time
from megatron_dlm.runtime.processes import forks_die_with_us
lock, held = threading.Lock(), threading.Event()
def hold():
    with lock:
        held.set()
        time.sleep(1000)
threading.Thread(target=hold, daemon=True).start()
held.wait()
with forks_die_with_us() if sys.argv[1] == "dies" else contextlib.nullcontext():
    child = os.fork()
if child == 0:
    lock.acquire()
print(child, flush=True)
time.sleep(1000)
"""


def is_there(process: int) -> bool:
    """A zombie that nobody has waited for yet is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel must be Linux")
@pytest.mark.parametrize("how", ["dies", "stays"])
def test_a_deadlocked_fork_of_a_killed_process(how: str) -> None:
    command = [sys.executable, "-c", _DEADLOCKED, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_there(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + (30 if how == "dies" else 1)
        while is_there(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_there(child) == (how == "stays")
        if how == "stays":
            os.kill(child, signal.SIGKILL)


def test_a_parent_that_was_gone_before_the_kernel_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child has another parent then."""
    monkeypatch.setattr(processes, "_dies_with", os.getppid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    monkeypatch.undo()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
