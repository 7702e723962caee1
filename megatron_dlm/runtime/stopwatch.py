"""Adds up how long pieces of work take on the device, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Wall-clock time on the CPU, time between two places of the current stream on a GPU."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._begun: Any = None
        self._pieces: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """A piece begins; one that did not end is forgotten."""
        self._begun = self._now()

    def end(self) -> None:
        """The piece ends; does nothing if none has begun."""
        if self._begun is not None:
            self._pieces.append((self._begun, self._now()))
            self._begun = None

    def take_seconds(self) -> float:
        """Of all pieces since the last call; waits until the last of them is done."""
        pieces, self._pieces = self._pieces, []
        if not self._is_cuda:
            return sum(last - first for first, last in pieces)
        for _, last in pieces[-1:]:
            last.synchronize()
        return sum(first.elapsed_time(last) for first, last in pieces) / 1000

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
