"""What a run reports in metrics.jsonl, and how long it will still take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dlm.training.log_entry import LogEntry, clock

_TAIL_BYTES = 1 << 16


def newest_reports(run_directory: Path) -> dict[str, LogEntry]:
    """Split (train, valid) -> its newest report; only the end of the file is read."""
    path = run_directory / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    # The last one may be half written, the first one half read.
    whole = lines[1:-1] if size > _TAIL_BYTES else lines[:-1]
    entries = [entry_of(line) for line in whole]
    return {entry.split: entry for entry in entries}


def entry_of(line: bytes) -> LogEntry:
    """One line of metrics.jsonl."""
    values = json.loads(line)
    return LogEntry(values.pop("step"), values.pop("split"), values)


def run_facts(run_directory: Path) -> dict[str, Any]:
    """run.json, empty before the first start."""
    path = run_directory / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def remaining_seconds(entry: LogEntry, num_steps: int) -> float | None:
    """Time to the last step at the reported speed, without validation and saves."""
    speed, tokens = entry.values.get("tokens_per_second"), entry.values.get("tokens")
    if not speed or not tokens or not entry.step:
        return None
    return (num_steps - entry.step) * tokens / entry.step / speed


def remaining_time(entry: LogEntry, num_steps: int) -> str:
    """The same in words."""
    seconds = remaining_seconds(entry, num_steps)
    return "unknown" if seconds is None else f"{clock(seconds)} at this speed"
