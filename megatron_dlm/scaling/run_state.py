"""How a run stands: what its status.json says, and whether a living process has its folder."""

from __future__ import annotations

import fcntl
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_dlm.checkpoint.run_lock import HEARTBEAT_SECONDS, LOCK_NAME, Owner, read_owner
from megatron_dlm.scaling.run_records import last_step
from megatron_dlm.training.status import read_status

_SILENT_SECONDS = 8 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class RunState:
    """One line of `study status`."""

    state: str
    """not begun, running, killed (it says that it runs, and no process does), or as status.json."""
    step: int | None = None
    """Finished updates, as far as was reported; None before the first start."""
    reason: str = ""

    @property
    def is_failure(self) -> bool:
        """It ended and should not have."""
        return self.state in ("failed", "killed")


def state_of(folder: Path) -> RunState:
    """Of the run in this folder."""
    status = read_status(folder)
    is_running = owner_of(folder) is not None
    if status is None:
        return RunState("running" if is_running else "not begun")
    if status.state == "finished" or not (is_running or status.state == "running"):
        return RunState(status.state, status.step, status.reason or "")
    # What status.json says of the step is from the start.
    step = max(status.step, last_step(folder / "metrics.jsonl") or 0)
    if is_running:
        return RunState("running", step)
    return RunState(
        "killed", step, "it ended without a word; `study run` goes on from where it saved"
    )


def owner_of(folder: Path) -> Owner | None:
    """The living process that trains in this folder, as far as can be told from here."""
    path = folder / LOCK_NAME
    owner = read_owner(path)
    if owner is None:
        return None
    is_locked = _is_locked(path)
    if is_locked:
        return owner
    if owner.host == socket.gethostname():
        is_alive = is_locked is None and psutil.pid_exists(owner.pid)
        return owner if is_alive else None
    # Locks may end at the host: then only the sign of life that it gives tells.
    silent_seconds = time.time() - path.stat().st_mtime
    return owner if silent_seconds < _SILENT_SECONDS else None


def _is_locked(path: Path) -> bool | None:
    """None where the file system has no locks."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False
