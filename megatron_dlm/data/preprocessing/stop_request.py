"""Ctrl-C and its kin as a request that long work answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Somebody asked us to stop."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Of the signal."""


class StopRequest:
    """Context manager that catches stop signals; a second one does what it always does."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self._received is not None:
            raise Stopped(self._received)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._previous = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
