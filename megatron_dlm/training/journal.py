"""What a run says about itself besides its numbers: status.json, events.jsonl, and what it is doing
right now, for those who watch over it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from megatron_dlm.training.events import EVENTS_FILE, EventKind, Events
from megatron_dlm.training.status import State, write_status


class Journal:
    """Kept by every rank; only rank 0 writes files. Also read by the threads that watch."""

    def __init__(self) -> None:
        self.step = 0
        """Finished updates."""
        self.directory: Path | None = None
        """The run directory, once it is this run's."""
        self.events = Events(None)
        """Set when the log of the run is open."""
        self._is_main = False
        self._doing = ("the start", time.monotonic(), 0.0)

    def open(self, directory: Path, *, step: int, is_main: bool) -> None:
        """From now on the run directory is ours; OSError where it cannot be written."""
        self.directory, self.step, self._is_main = directory, step, is_main
        self.status("running")

    def doing(self, what: str, *, patience: float = 1.0) -> None:
        """Something new begins; it may take `patience` times as long as a step."""
        self._doing = (what, time.monotonic(), patience)

    @property
    def state(self) -> str:
        """What the run is doing."""
        return self._doing[0]

    def is_overdue(self, step_seconds: float) -> bool:
        """Whether what it is doing takes longer than it may; never before the first step."""
        _, since, patience = self._doing
        return patience > 0 and time.monotonic() - since > patience * step_seconds

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Add to events.jsonl, after the last finished step unless `step` says otherwise."""
        self.events.write(kind, **{"step": self.step, **fields})

    def status(self, state: State, reason: str | None = None) -> None:
        """Replace status.json."""
        if self._is_main and self.directory is not None:
            write_status(self.directory, state, self.step, reason)

    def end(self, state: State, reason: str | None = None) -> None:
        """The run is over for now: status.json and events.jsonl."""
        self.status(state, reason)
        self.event("end", state=state, reason=reason)

    def failed(self, reason: str, *, is_writer: bool) -> None:
        """The same after an error, from any thread, also when the log is closed already."""
        if self.directory is None:
            return
        # A disk that is full must not hide why the run ended.
        with contextlib.suppress(OSError):
            if is_writer:
                write_status(self.directory, "failed", self.step, reason)
            if self._is_main and not self.events.has_end:
                with Events(self.directory / EVENTS_FILE) as events:
                    events.write("end", step=self.step, state="failed", reason=reason)
