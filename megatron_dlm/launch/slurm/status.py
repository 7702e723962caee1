"""`megatron-dlm slurm status`: the queue and the files of runs, on a few lines each."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_dlm.config.slurm_commands import SlurmStatusConfig
from megatron_dlm.launch.slurm.progress import newest_reports, remaining_time
from megatron_dlm.launch.slurm.queue import queue_of
from megatron_dlm.launch.slurm.run_state import run_state
from megatron_dlm.training.log_entry import clock
from megatron_dlm.training.status import Status


def status(config: SlurmStatusConfig) -> None:
    """Show every run; ValueError for a directory that is none of a run on Slurm."""
    for name in config.run:
        print("\n".join(describe(Path(name))))


def describe(run_directory: Path) -> list[str]:
    """What there is to know about a run, line by line."""
    state = run_state(run_directory)
    num_steps = "?" if state.num_steps is None else state.num_steps
    lines = [
        f"{run_directory}: {state.kind}, newest checkpoint at step {state.step} of {num_steps}"
    ]
    lines += [f"  {job}" for job in queue_of(run_directory)] or ["  no job waits or runs"]
    lines += _last_word(state.status)
    reports = newest_reports(run_directory)
    lines += [f"  {report.line(state.num_steps or 0)}" for report in reports.values()]
    if "train" in reports and state.num_steps is not None and state.kind != "finished":
        age = time.time() - (run_directory / "metrics.jsonl").stat().st_mtime
        remaining = remaining_time(reports["train"], state.num_steps)
        lines.append(f"  remaining {remaining}; last report {clock(age)} ago")
    return [*lines, *_last_crash(run_directory / "slurm" / "crashes.txt")]


def _last_word(status: Status | None) -> list[str]:
    """What the trainer said about itself last."""
    if status is None:
        return []
    where = f" in job {status.job}" if status.job else ""
    why = f": {status.reason}" if status.reason else ""
    return [f"  trainer {status.state} at step {status.step}{where}, {status.time}{why}"]


def _last_crash(path: Path) -> list[str]:
    """The last line of the count of crashes that the job script keeps, in words."""
    if not path.exists():
        return []
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    place, job, _, _, when, reason = last.split(maxsplit=5)
    step = f" at step {place}" if place.isdigit() else f" ({place})"
    return [f"  last crash {when}, job {job}{step}: {reason}"]
