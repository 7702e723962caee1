"""What the user sees while a run trains: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_dlm.training.log_entry import LogEntry, clock
from megatron_dlm.training.log_sinks import Sink


class ConsoleLog(Sink):
    """Progress, losses, speed and the time left, measured from this process's own steps."""

    def __init__(
        self, label: str, total_steps: int, resume_step: int, console: Console | None = None
    ) -> None:
        """`label` names the run in the live view; the time left counts from `resume_step`."""
        self._total_steps = total_steps
        self._first_step = self._last_step = resume_step
        self._started = time.monotonic()
        self._console = console or Console(file=sys.stdout)
        self._validation = ""
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                auto_refresh=False,  # a thread that redraws would take time from the training
            )
            self._task = self._live.add_task(
                label, total=total_steps, completed=resume_step, status=""
            )
            self._live.start()

    def write(self, entry: LogEntry) -> None:
        self._last_step = entry.step
        if self._live is None:
            left = f"  left {self._time_left(entry.step)}" if entry.split == "train" else ""
            self.note(entry.line(self._total_steps) + left)
        elif entry.split == "train":
            self._live.update(self._task, completed=entry.step, status=self._status(entry))
            self._live.refresh()
        else:
            self._validation = f"  {entry.split} {entry.values.get('nelbo', float('nan')):.3f}"
            self.note(entry.line(self._total_steps))

    def note(self, message: str) -> None:
        # Not print(): the live bar must be moved out of the way. A line is never wrapped in a file.
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def rewind(self, step: int) -> None:
        """Steps taken in vain took their time: the speed counts them, the bar does not."""
        self._first_step -= self._last_step - step
        self._last_step = step

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _status(self, entry: LogEntry) -> str:
        values = [
            f"{name} {entry.values[name]:.3f}" for name in ("nelbo", "loss") if name in entry.values
        ]
        if len(values) == 2 and entry.values["nelbo"] == entry.values["loss"]:
            values.pop()
        speed = entry.values.get("tokens_per_second", float("nan"))
        return (
            f"{'  '.join(values)}{self._validation}  {speed:,.0f} tok/s  "
            f"left {self._time_left(entry.step)}"
        )

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        return clock((time.monotonic() - self._started) / done * (self._total_steps - step))
