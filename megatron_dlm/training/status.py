"""status.json: in one line, how a run stands. For job scripts and people; no torch here."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from megatron_dlm.config.json_text import parse_json

STATUS_FILE = "status.json"

State = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """What status.json says."""

    state: State
    """preempted: asked to stop by a signal, saved, and to be started again."""
    step: int
    """Finished updates when it was written."""
    reason: str | None
    """Why it ended; None while it runs and when it finished."""
    time: str
    """ISO 8601, UTC."""
    job: str | None
    """Number of the Slurm job."""
    restart: int
    """How often Slurm has started this job again."""
    host: str
    pid: int
    """Of the process that wrote it."""

    @property
    def is_of_this_job(self) -> bool:
        """Written by the start of the Slurm job in whose environment this process runs."""
        return (self.job, self.restart) == (job_number(), restart_count())


def write_status(directory: Path, state: State, step: int, reason: str | None = None) -> None:
    """Replace status.json at once; raises OSError where the directory cannot be written."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    place = (job_number(), restart_count(), socket.gethostname(), os.getpid())
    status = Status(state, step, reason, now, *place)
    # A name of its own: when rank 0 is dead several ranks may write at the same time.
    temporary = directory / f"{STATUS_FILE}.{status.host}.{status.pid}.tmp"
    temporary.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
    temporary.replace(directory / STATUS_FILE)


def read_status(directory: Path) -> Status | None:
    """What status.json says; None before the first start, or where it is damaged."""
    try:
        return Status(**parse_json((directory / STATUS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def job_number() -> str | None:
    """Of the Slurm job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def restart_count() -> int:
    """Slurm sets it from the first time that a job is queued again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
