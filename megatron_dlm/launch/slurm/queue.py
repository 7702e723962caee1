"""Slurm's own commands, and which of its jobs belong to a run."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SIGNAL_SECONDS = 2.0


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue."""

    number: str
    """What the run knows it by: a job or a whole array (12), or one task (12_3) of a sweep."""
    own_number: int
    """Of the job, also where it is a task of an array."""
    name: str
    """What squeue shows: 12, 12_3 or 12_[4-7]."""
    state: str
    used: str
    limit: str
    place: str
    """Its nodes, or in parentheses why it waits."""

    def __str__(self) -> str:
        return f"job {self.name} {self.state} {self.place}, {self.used} of {self.limit}"


def slurm(*command: str) -> str:
    """Output of sbatch, squeue, scancel or scontrol; ValueError with its message if it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not there; run this command where Slurm is, on a login node"
        ) from None
    if answer.returncode != 0:
        message = " ".join(answer.stderr.split()) or f"exit status {answer.returncode}"
        raise ValueError(f"{command[0]} failed: {message}")
    return answer.stdout


def ask_to_save(number: int) -> None:
    """Send the user signal to the script of a running job.

    For a task of an array scancel delivers it but reports that the job is in transition, and sends
    it again and again until the job has ended; so it is not waited for, and its status means
    nothing.
    """
    command = ["scancel", "--batch", "--signal=USR1", str(number)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=_SIGNAL_SECONDS, check=False)


def numbers_of(run_directory: Path) -> list[str]:
    """Numbers of all jobs of a run, the oldest first.

    Raises ValueError where the directory is none of a run on Slurm.
    """
    path = run_directory / "slurm" / "jobs.txt"
    if not path.is_file():
        raise ValueError(
            f"{run_directory} has no slurm/jobs.txt: no job of this run was submitted; name the "
            "run's train.output_dir"
        )
    return path.read_text(encoding="utf-8").split()


def add_number(run_directory: Path, number: int) -> None:
    """Note that a job belongs to the run."""
    with (run_directory / "slurm" / "jobs.txt").open("a", encoding="utf-8") as file:
        file.write(f"{number}\n")


def queue_of(run_directory: Path) -> list[QueuedJob]:
    """Jobs of the run that wait or run, the oldest first."""
    numbers = set(numbers_of(run_directory))
    found: list[QueuedJob] = []
    # All jobs, not --jobs: that is an error as soon as Slurm has forgotten the only one.
    for line in slurm("squeue", "--noheader", "--format=%F|%A|%i|%T|%M|%l|%R").splitlines():
        array, own_number, name, *shown = line.split("|", maxsplit=6)
        found += [
            QueuedJob(number, int(own_number), name, *shown)
            for number in numbers
            if number in (array, name)
        ]
    return sorted(found, key=lambda job: job.own_number)
