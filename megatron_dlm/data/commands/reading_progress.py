"""Bytes read, rate and time left on stderr: a live bar in a terminal, now and then a line else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_SECONDS = 30.0


@contextmanager
def reading_progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told of bytes as they are read."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, total_bytes)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _lines(label: str, total_bytes: int) -> Callable[[int], None]:
    started = last = time.monotonic()
    done_bytes = 0

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes, last
        done_bytes += num_bytes
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        rate = done_bytes / (now - started)
        left_seconds = (total_bytes - done_bytes) / rate
        print(
            f"{label}: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, "
            f"{rate / 1e6:.0f} MB/s, {left_seconds / 60:.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )

    return advance
