"""events.jsonl: what happened to a run besides its numbers, over all its starts."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

EVENTS_FILE = "events.jsonl"

EventKind = Literal[
    "start",
    "resume",
    "save",
    "damaged",
    "signal",
    "rollback",
    "spike",
    "straggler",
    "hang",
    "end",
]


class Events:
    """Appends one JSON object per line: time, kind, step and what the caller adds.

    The line is with the operating system when `write` returns. A file that cannot be written (a
    full disk) never stops a run: the event is lost, the numbers are not in it. Only rank 0 gives a
    path; without one nothing is written. A context manager.
    """

    def __init__(self, path: Path | None) -> None:
        """`path`: its directory exists. Raises OSError where the file cannot be opened."""
        self.has_end = False
        """The last event was an end."""
        self._file = None if path is None else path.open("ab", buffering=0)
        if path is not None and _ends_in_a_half_line(path):
            self._append(b"\n")  # what a killed process left must not swallow the next event

    def write(self, kind: EventKind, *, step: int | None = None, **fields: Any) -> None:
        """Report an event after update number `step`; `fields` are plain values (JSON)."""
        assert kind in get_args(EventKind), f"unknown kind of event: {kind}"
        assert not fields.keys() & {"time", "kind"}, f"an event has time and kind: {fields}"
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record: dict[str, Any] = {"time": now, "kind": kind}
        if step is not None:
            record["step"] = step
        self.has_end = kind == "end"
        self._append(orjson.dumps({**record, **fields}, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Close the file; later events are dropped. Does nothing the second time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # see the docstring of the class
                self._file.write(line)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _ends_in_a_half_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read() != b"\n"
