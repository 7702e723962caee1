"""This process's share of the machine, and worker processes that do not outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait


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
