"""`megatron-dlm slurm cancel`: ends the jobs of a run without losing a step."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_dlm.config.slurm_commands import SlurmCancelConfig
from megatron_dlm.launch.slurm.queue import ask_to_save, queue_of, slurm
from megatron_dlm.launch.slurm.run_state import run_state

_POLL_SECONDS = 0.5


def cancel(config: SlurmCancelConfig) -> None:
    """End all jobs of the run and say where it stands.

    Raises ValueError when a job had to be killed before it had saved.
    """
    run_directory = Path(config.run)
    killed = cancel_jobs(run_directory, config.save_seconds)
    state = run_state(run_directory)
    if killed:
        raise ValueError(
            f"job {' '.join(killed)} had not saved after {config.save_seconds:g} s and "
            f"was killed; the newest checkpoint of {run_directory} is that of step {state.step}"
        )
    print(f"{run_directory}: {state.kind}, saved at step {state.step}; submit again to go on")


def cancel_jobs(run_directory: Path, save_seconds: float) -> list[str]:
    """Ask running jobs to save, and wait; returns the numbers of those that had to be killed."""
    queue = queue_of(run_directory)
    numbers = sorted({job.number for job in queue})
    if not numbers:
        return []
    for number in numbers:  # what the job script looks for before it queues itself again
        (run_directory / "slurm" / f"stop_{number}").touch()
    # Those that wait first: otherwise the next of a chain would start when one ends.
    slurm("scancel", "--state=PENDING", *numbers)
    for job in queue:
        if job.state == "RUNNING":
            ask_to_save(job.own_number)
    deadline = time.monotonic() + save_seconds
    while queue := queue_of(run_directory):
        if any(job.state == "PENDING" for job in queue):  # one was just queuing itself again
            slurm("scancel", "--state=PENDING", *numbers)
        if time.monotonic() > deadline:
            slurm("scancel", *numbers)
            return sorted({job.number for job in queue})
        time.sleep(_POLL_SECONDS)
    return []
