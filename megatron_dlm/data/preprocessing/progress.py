"""Live progress of a long job on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from megatron_dlm.data.inputs.formats import format_of
from megatron_dlm.data.inputs.input_plan import Job
from megatron_dlm.data.preprocessing.job_workers import Report

_LINE_SECONDS = 30.0
_BAR_SECONDS = 0.2
# Text is about so many times its packed bytes, until the first packed job has told.
_USUAL_EXPANSION = 3.0


class ProgressDisplay:
    """Documents, bytes and tokens per second, and the time left; a context manager."""

    def __init__(self, jobs: Mapping[int, Job]) -> None:
        self.documents = self.num_bytes = self.tokens = 0
        self._jobs = jobs
        self._total_bytes = sum(job.num_bytes for job in jobs.values())
        self._done_bytes = self._num_done = 0
        self._active: Counter[int] = Counter()  # text read, by job
        self._packed_bytes, self._unpacked_bytes = 0, 0  # of the packed jobs that are done
        self._started = self._shown = time.monotonic()
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("jobs, {task.fields[text]}"))
        self._bar = Bar(*columns, console=console, transient=True) if console.is_terminal else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def add(self, report: Report) -> None:
        """Count what a worker reports, and show it from time to time."""
        if report.progress is not None:
            self._active[report.job] += report.progress.num_bytes
            self.documents += report.progress.documents
            self.num_bytes += report.progress.num_bytes
            self.tokens += report.progress.tokens
        else:
            job, text_bytes = self._jobs[report.job], self._active.pop(report.job, 0)
            self._num_done += 1
            self._done_bytes += job.num_bytes
            if _is_packed(job):
                self._packed_bytes += job.num_bytes
                self._unpacked_bytes += text_bytes
        if time.monotonic() - self._shown >= (_LINE_SECONDS if self._bar is None else _BAR_SECONDS):
            self._show()

    def text(self) -> str:
        """What is shown."""
        seconds = max(self.seconds, 1e-3)
        parts = [
            f"{self.documents:,} documents ({self.documents / seconds:,.0f}/s)",
            f"{self.num_bytes / 1e6:,.0f} MB ({self.num_bytes / seconds / 1e6:,.1f} MB/s)",
            f"{self.tokens:,} tokens ({self.tokens / seconds:,.0f}/s)",
        ]
        share = self.share_done()
        if 0 < share < 1:
            parts.append(f"about {_duration(seconds * (1 - share) / share)} left")
        return ", ".join(parts)

    def share_done(self) -> float:
        """Share of the input's bytes on disk; that of a packed file is reckoned from its text."""
        expansion = _USUAL_EXPANSION
        if self._unpacked_bytes:
            expansion = self._unpacked_bytes / self._packed_bytes
        done = float(self._done_bytes)
        for number, text_bytes in self._active.items():
            job = self._jobs[number]
            on_disk = text_bytes / expansion if _is_packed(job) else text_bytes
            done += min(on_disk, 0.99 * job.num_bytes)
        return done / self._total_bytes if self._total_bytes else 0.0

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_done, text=self.text())
        else:
            line = f"{self._num_done} of {len(self._jobs)} jobs, {self.text()}"
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=len(self._jobs), text="starting")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _is_packed(job: Job) -> bool:
    """Whether the bytes on disk are fewer than those of the text."""
    formats = [format_of(piece.path) for piece in job.pieces]
    return any(form.codec is not None or form.layout == "parquet" for form in formats)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
