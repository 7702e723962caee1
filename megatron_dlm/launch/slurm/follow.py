"""`megatron-dlm slurm follow`: the reports of a run as they come, and what becomes of its jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dlm.config.slurm_commands import SlurmFollowConfig
from megatron_dlm.launch.slurm.progress import entry_of, run_facts
from megatron_dlm.launch.slurm.queue import queue_of
from megatron_dlm.launch.slurm.run_state import run_state


def follow(config: SlurmFollowConfig) -> None:
    """Print until no job of the run waits or runs any more; Ctrl-C ends only the watching."""
    try:
        for line in watch(Path(config.run), config):
            print(line, flush=True)
    except KeyboardInterrupt:
        print("no longer watching; the job goes on")


def watch(run_directory: Path, config: SlurmFollowConfig) -> Iterator[str]:
    """Lines to show; waits between them."""
    reports = _Reports(run_directory / "metrics.jsonl")
    known_jobs: set[str] = set()
    is_first = True
    while True:
        # The queue first: what a job reports before it ends is then still read below.
        queue = queue_of(run_directory)
        jobs = [f"job {job.name} {job.state} {job.place}" for job in queue]
        yield from (job for job in jobs if job not in known_jobs)
        known_jobs = set(jobs)
        num_steps = int(run_facts(run_directory).get("steps", 0))
        lines = [entry_of(line).line(num_steps) for line in reports.news()]
        yield from lines[max(0, len(lines) - config.num_reports) :] if is_first else lines
        is_first = False
        if not queue:
            state = run_state(run_directory)
            yield f"no job waits or runs; the run is {state.kind} at step {state.step}"
            return
        time.sleep(config.interval_seconds)


class _Reports:
    """Reads metrics.jsonl again and again, also after a resumed run has cut its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: list[bytes] = []

    def news(self) -> list[bytes]:
        """Whole lines that were not there before."""
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        pairs = zip(lines, self._read, strict=False)
        same = next((place for place, (new, old) in enumerate(pairs) if new != old), None)
        if same is None:
            same = min(len(lines), len(self._read))
        self._read = lines
        return lines[same:]
