"""Ends all ranks when one has died, failed or hangs, and says which one it was.

Every rank holds one TCP connection to rank 0, beside and independent of torch.distributed: a rank
that waits inside a collective still hears, also in the first one, in which groups find together.
The kernel closes the connection of a process however it dies, and gives up that of a host that
vanished after about 20 s. One JSON object per line.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dlm.runtime.lifeline_hub import Hub, Rank, keep_alive, read_lines
from megatron_dlm.runtime.meeting import Meeting

CONNECT_SECONDS = 60.0
# How long a rank that failed waits for the verdict; more than a vanished host takes to be noticed.
VERDICT_SECONDS = 40.0

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Of this process; a forked writer must not keep them open."""


@dataclass(frozen=True)
class Callbacks:
    """What a rank does when it is told; called in the thread of the lifeline."""

    state: Callable[[], str]
    """What this rank is doing, in a few words."""
    dump_stacks: Callable[[], None]
    """Write the stacks of all threads to a file."""
    end: Callable[[str, bool], None]
    """End the process: given the verdict, and whether this rank is to write it down."""


class Lifeline:
    """The connection of one rank. A context manager; inside a single process it does nothing."""

    def __init__(self, meeting: Meeting, callbacks: Callbacks) -> None:
        """Connects; raises ValueError where rank 0 does not come, OSError where it cannot be
        reached."""
        self._callbacks = callbacks
        self._rank = meeting.rank
        self._is_active = meeting.world_size > 1
        self._hub: Hub | None = None
        self._has_failed = False
        self._left = False
        self._verdict = threading.Event()
        if self._is_active:
            self._connect(meeting)

    def report_failure(self, error: str, *, is_consequence: bool) -> None:
        """Tell all ranks that this one failed; returns when they know, or after a while.

        is_consequence: the error says that another rank is gone. The verdict then names that one,
        and this rank is ended with it.
        """
        if not self._is_active:
            return
        self._has_failed = not is_consequence
        self._send(failed=error, is_consequence=is_consequence)
        self._verdict.wait(VERDICT_SECONDS)

    def report_hang(self, reason: str) -> None:
        """Have all ranks write their stacks and end."""
        if not self._is_active:
            self._callbacks.dump_stacks()
            self._callbacks.end(reason, True)
        self._send(hang=reason)

    def leave(self) -> None:
        """The run of this rank is over, well or agreed: nobody needs to end because of it."""
        self._left = True
        if self._is_active:
            self._send(bye=True)
        if self._hub is not None:
            self._hub.dismiss()

    def _connect(self, meeting: Meeting) -> None:
        me = Rank(meeting.rank, socket.gethostname(), os.getpid())
        token, port = secrets.token_hex(16), 0
        if meeting.is_main:
            listener = socket.create_server(("", 0), backlog=meeting.world_size)
            _sockets.add(listener)
            port = listener.getsockname()[1]
            self._hub = Hub(listener, token, meeting.world_size, _sockets)
            self._hub.start()
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        first, host, port, token = meeting.from_main("lifeline", (vars(me), host, port, token))
        self._first = Rank(**first)
        place = "127.0.0.1" if meeting.is_main else host
        self._socket = socket.create_connection((place, port), timeout=CONNECT_SECONDS)
        self._socket.settimeout(None)
        keep_alive(self._socket)
        _sockets.add(self._socket)
        self._send(token=token, rank=me.number, host=me.host, pid=me.pid)
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # rank 0 is gone: the listening thread sees it too
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        for message in read_lines(self._socket):
            if "dump" in message:
                self._callbacks.dump_stacks()
                self._send(state=self._callbacks.state())
            elif "verdict" in message:
                return self._obey(message["verdict"], is_writer=self._rank == 0)
            elif "bye" in message:
                return
        if not self._left:
            doing = self._callbacks.state()
            self._obey(f"{self._first} died; this rank was in {doing}", is_writer=True)

    def _obey(self, verdict: str, *, is_writer: bool) -> None:
        if self._has_failed:  # its own error is being shown; only if that gets stuck
            self._verdict.set()
            time.sleep(VERDICT_SECONDS)
        self._callbacks.end(verdict, is_writer)
        self._verdict.set()

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()


def _close_in_child() -> None:
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)
