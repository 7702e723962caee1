"""Remembers SIGTERM, SIGUSR1 and Ctrl-C from the first moment of a run to its end.

Nothing heavy is imported here: the handlers must be in place before anything slow begins. What the
ranks make of a signal together is the matter of `stop_vote`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType

# The place in this tuple, counted from 1, is what travels between ranks.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

# Ctrl-C in a terminal reaches a torchrun worker twice: once itself, once passed on by torchrun.
_SAME_INTERRUPT_SECONDS = 2.0
# A signalled rank waits this long for others to appear; below Slurm's usual KillWait of 30 s.
START_SECONDS = 20.0


class StopSignals:
    """Remembers the stop signals that this process received.

    A context manager: the handlers live inside the `with` block. Signals may repeat; only a later
    second Ctrl-C raises KeyboardInterrupt at once. Outside of the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._guard: _StartGuard | None = None

    @property
    def received(self) -> int:
        """The place in STOP_SIGNALS, counted from 1, of the strongest one so far; 0 for none."""
        return self._received

    def guard_start(self) -> None:
        """From now until `started`: a signalled process whose partners do not come ends with 0.

        Python runs no handler while the main thread waits inside a library for other ranks.
        """
        self._guard = _StartGuard(self._received)

    def started(self) -> None:
        """All ranks are there: from now on they stop together."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self.started()
        for number, handler in self._previous.items():
            if self._received:  # repeated during the last moments it must not spoil a clean end
                handler = signal.SIG_IGN
            # None: the former handler was not set from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            first, self._interrupted_at = self._interrupted_at, self._interrupted_at or now
            if first is not None and now - first > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
        self._received = max(self._received, STOP_SIGNALS.index(signal.Signals(number)) + 1)


def signal_name(place: int) -> str | None:
    """ "SIGTERM" for its place in STOP_SIGNALS, counted from 1; None for 0."""
    return STOP_SIGNALS[place - 1].name if place else None


class _StartGuard:
    """Ends the process START_SECONDS after a stop signal, unless it is closed before."""

    def __init__(self, received: int) -> None:
        """`received`: the place in STOP_SIGNALS of a signal that came before; 0 for none."""
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._closed = threading.Event()
        if received:
            theirs.send(bytes([STOP_SIGNALS[received - 1]]))
        threading.Thread(target=self._watch, name="start_guard", daemon=True).start()

    def close(self) -> None:
        if not self._closed.is_set():
            signal.set_wakeup_fd(self._previous)
            self._closed.set()
            with contextlib.suppress(OSError):
                self._theirs.send(b"\0")  # wakes the thread, which closes both ends

    def _watch(self) -> None:
        numbers = {int(number) for number in STOP_SIGNALS}
        while not self._closed.is_set():
            select.select([self._ours], [], [])
            name = next((number for number in self._ours.recv(64) if number in numbers), None)
            if name is not None and not self._closed.wait(START_SECONDS):
                print(
                    f"{signal.Signals(name).name}: stopped before the other ranks appeared; "
                    "nothing had been done",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(0)
        self._ours.close()
        self._theirs.close()
