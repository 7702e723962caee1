"""Turns SIGTERM, SIGUSR1 and Ctrl-C into a stop that all ranks take after the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

# The place in this tuple, counted from 1, is what travels between ranks.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

# Ctrl-C in a terminal reaches a torchrun worker twice: once itself, once passed on by torchrun.
_SAME_INTERRUPT_SECONDS = 2.0


class StopRequest:
    """Remembers a stop signal; `poll` says, after the same step on every rank, that one arrived.

    A context manager: the signal handlers live inside the `with` block. A second Ctrl-C raises
    KeyboardInterrupt at once.
    """

    def __init__(self, control_group: dist.ProcessGroup | None = None) -> None:
        """`control_group`: gloo, all ranks; None for a single process."""
        self._group = control_group
        self._received = 0
        self._interrupted_at: float | None = None
        self._vote: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        """Take over the stop signals; does nothing the second time."""
        if not self._previous:
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Give the signals back to their former handlers; does nothing the second time."""
        for number, handler in self._previous.items():
            # None: the former handler was not set from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._previous.clear()

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def poll(self) -> str | None:
        """Name of the signal that any rank received ("SIGTERM"), or None. Call once per step.

        One asynchronous all-reduce(MAX) of an int per call, read at the next call: ranks never wait
        for it, all get the same answer, and the answer is one step old.
        """
        if self._group is None or dist.get_world_size(self._group) == 1:
            return _name(self._received)
        agreed = 0
        if self._work is not None and self._vote is not None:
            self._work.wait()
            agreed = int(self._vote)
        self._vote = torch.tensor(self._received, dtype=torch.int64)
        self._work = dist.all_reduce(
            self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return _name(agreed)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            first, self._interrupted_at = self._interrupted_at, self._interrupted_at or now
            if first is not None and now - first > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
        self._received = max(self._received, STOP_SIGNALS.index(signal.Signals(number)) + 1)


def _name(place: int) -> str | None:
    return STOP_SIGNALS[place - 1].name if place else None
