"""This process's share of the machine, and worker processes that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
_dies_with: int | None = None
"""Process id that a child forked now must not outlive."""


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent(channels: Sequence[Connection] = ()) -> None:
    """Call in a worker process: it ends at once when its parent does, even by kill -9.

    It ends as well when the other end of one of the `channels` is closed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process has a parent to end with"
    ends = [parent.sentinel, *channels]
    threading.Thread(target=_exit_after, args=(ends,), name="end_with_parent", daemon=True).start()


def _exit_after(ends: Sequence[Connection | int]) -> None:
    wait(ends)
    os._exit(1)


@contextlib.contextmanager
def forks_die_with_us() -> Iterator[None]:
    """Inside, what this thread forks is killed by the kernel as soon as this thread is gone.

    For forks of a process with threads: such a child may wait for ever for a lock that nobody
    holds, and then no thread of its own could end it. On Linux only; elsewhere nothing happens.
    """
    global _dies_with
    _dies_with = os.getpid()
    try:
        yield
    finally:
        _dies_with = None


def _die_with_parent() -> None:
    """The first that a forked child does."""
    global _dies_with
    parent, _dies_with = _dies_with, None
    if parent is None or _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel knew of our wish
        os._exit(1)


os.register_at_fork(after_in_child=_die_with_parent)
