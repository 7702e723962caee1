"""The quickstart, shortened, as a user starts it."""

from __future__ import annotations

from pathlib import Path

from command_line import Ended, Job, start

STEPS = 6


def start_quickstart(directory: Path, **changes: object) -> Job:
    """In `directory`, which gets the folder quickstart/."""
    settings = {"steps": STEPS, "unique_tokens": 4096, **changes}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return start(["quickstart", *flags], directory / "log")


def run_quickstart(directory: Path) -> Ended:
    """To its end."""
    return start_quickstart(directory).end(timeout=500)
