"""One job at a time in a run directory; a job that died does not hold it.

The lock is `flock`, which the kernel (or the server of a shared file system) gives back when the
process ends, however it ends. Some file systems lock only within one host or not at all, so the
file also says who holds it and its modification time is renewed: a record whose time stands still
is of a dead job. Times are only compared with earlier readings, never with this host's clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from megatron_dlm.config.json_text import parse_json

LOCK_NAME = "run.lock"
HEARTBEAT_SECONDS = 15.0
_GRACE_SECONDS = 2.0  # a process that was just killed may still be closing its files
_POLL_SECONDS = 0.1
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_held: set[int] = set()
"""Descriptors of the locks of this process; a forked child must not keep them open."""


@dataclass(frozen=True)
class Owner:
    """Who holds the lock, as the file says."""

    host: str
    pid: int
    since: str
    job: str | None
    token: str

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid}{job} on {self.host} since {self.since}"


class RunLock:
    """`with RunLock(directory):` refuses with a ValueError while another job has the directory."""

    def __init__(self, directory: Path, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._path = directory / LOCK_NAME
        self._heartbeat_seconds = heartbeat_seconds
        self._descriptor = -1
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        self._descriptor = self._open()
        _held.add(self._descriptor)
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        self._heart = threading.Thread(target=self._beat, name="run_lock", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor not in _held:  # a forked child: it is its parent's
            return
        assert self._heart is not None
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # a file system that has gone: the lock ends anyway
            os.ftruncate(self._descriptor, 0)
        self._close()

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(
                f"{self._path.parent} is not writable ({error.strerror}); choose another directory"
            ) from None

    def _close(self) -> None:
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def _take(self) -> None:
        is_locked = self._lock_or_refuse()
        owner = read_owner(self._path)
        if owner is not None and self._is_alive(owner, is_locked=is_locked):
            raise ValueError(self._refusal(owner))
        mine = Owner(
            socket.gethostname(),
            os.getpid(),
            datetime.now().astimezone().isoformat(timespec="seconds"),
            os.environ.get("SLURM_JOB_ID"),
            uuid.uuid4().hex,
        )
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(mine)).encode(), 0)
        if not is_locked:  # of two that came at the same time, the last to write has it
            time.sleep(1.0)
            owner = read_owner(self._path)
            if owner is not None and owner != mine:
                raise ValueError(self._refusal(owner))

    def _lock_or_refuse(self) -> bool:
        """False where the file system has no locks."""
        start = time.monotonic()
        watch = _Watch(self._path)
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in _NO_LOCKS_HERE:
                    return False
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
            owner = read_owner(self._path)
            # A server gives back the locks of a host that vanished only after a while.
            is_remote = owner is not None and owner.host != socket.gethostname()
            patience = 8 * self._heartbeat_seconds if is_remote else _GRACE_SECONDS
            is_alive = owner is not None and watch.has_moved()
            if is_alive or time.monotonic() - start > patience:
                raise ValueError(self._refusal(owner))
            time.sleep(_POLL_SECONDS)

    def _is_alive(self, owner: Owner, *, is_locked: bool) -> bool:
        """Whether a record that was not taken back is of a living process."""
        if owner.host == socket.gethostname():
            return not is_locked and _is_running(owner.pid)
        seconds = 3 * self._heartbeat_seconds
        print(f"{self._path}: {owner} may be dead; waiting {seconds:g} s to see", flush=True)
        watch = _Watch(self._path)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if watch.has_moved():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _refusal(self, owner: Owner | None) -> str:
        who = f"{owner}" if owner is not None else "another process"
        return (
            f"{self._path.parent} is in use by {who}; wait for that job or end it, or choose "
            "another train.output_dir"
        )

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_seconds):
            try:
                os.utime(self._descriptor)
            except OSError:  # a file system that hiccups: the lock itself is what counts
                continue


class _Watch:
    """Whether somebody renews a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = self._read()

    def has_moved(self) -> bool:
        return self._read() != self._first

    def _read(self) -> tuple[int, str]:
        with self._path.open() as stream:  # opening asks the server; a bare stat may be cached
            return os.fstat(stream.fileno()).st_mtime_ns, stream.read()


def read_owner(path: Path) -> Owner | None:
    """Who the lock file names; None when it is empty, missing or unreadable."""
    try:
        return Owner(**parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
