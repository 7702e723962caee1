"""The log of a run: `open_run_log` on every rank, files and console on rank 0 only."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dlm.config.schema import LoggingConfig
from megatron_dlm.training.console import ConsoleLog
from megatron_dlm.training.events import EVENTS_FILE, Events
from megatron_dlm.training.histogram import Histogram
from megatron_dlm.training.log_entry import LogEntry
from megatron_dlm.training.log_sinks import MetricsFile, Sink, TensorBoardLog, TextLog, WandbLog


class RunLog:
    """Gives every report to all its sinks; without sinks (ranks other than 0) it does nothing."""

    def __init__(
        self, sinks: Sequence[Sink] = (), events: Events | None = None, signpost: Sequence[str] = ()
    ) -> None:
        """`signpost` says where the results are; it is shown now and again at the end."""
        self._sinks = tuple(sinks)
        self._signpost = tuple(signpost)
        self.events = events or Events(None)
        """What happened; on ranks other than 0 nothing is written."""
        self._show_signpost()

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Report `values` of `split` (train or valid) after update number `step`."""
        entry = LogEntry(step, split, dict(values))
        for sink in self._sinks:
            sink.write(entry)

    def note(self, message: str) -> None:
        """Tell the user something that is not a number."""
        for sink in self._sinks:
            sink.note(message)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Report histograms by name; TensorBoard alone shows them."""
        for sink in self._sinks:
            sink.histograms(step, found)

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: what was reported after it is cut, for it comes again."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close all files; the signpost is the last that is said."""
        self._show_signpost()
        for sink in self._sinks:
            sink.close()
        self.events.close()

    def _show_signpost(self) -> None:
        for line in self._signpost:
            self.note(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_run_log(
    output_dir: Path,
    logging: LoggingConfig,
    *,
    is_main: bool,
    total_steps: int,
    resume_step: int = 0,
    config: Mapping[str, object] | None = None,
) -> RunLog:
    """The log of the run in `output_dir`, which exists; entries after `resume_step` are cut.

    `config` is the resolved configuration, for TensorBoard and Weights & Biases. Raises ValueError
    or OSError on rank 0 if a sink cannot be opened.
    """
    if not is_main:
        return RunLog()
    sinks: list[Sink] = [
        MetricsFile(output_dir / "metrics.jsonl", resume_step),
        TextLog(output_dir / "train.log", total_steps),
    ]
    if logging.tensorboard:
        sinks.append(TensorBoardLog(output_dir / "tensorboard", resume_step, config or {}))
    if logging.wandb_project is not None:
        sinks.append(WandbLog(logging.wandb_project, output_dir, config or {}))
    events = Events(output_dir / EVENTS_FILE)
    # Last: nothing that can fail comes after the live view has taken the terminal.
    sinks.append(ConsoleLog(output_dir.name, total_steps, resume_step))
    if resume_step:
        events.write("resume", step=resume_step, total_steps=total_steps, **_place())
    else:
        events.write("start", step=0, total_steps=total_steps, **_place())
    return RunLog(sinks, events, _signpost(output_dir, logging))


def _place() -> dict[str, str]:
    """Where this start of the run takes place."""
    place = {"host": socket.gethostname()}
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        if name in os.environ:
            place[name.lower()] = os.environ[name]
    return place


def _signpost(output_dir: Path, logging: LoggingConfig) -> list[str]:
    path = shlex.quote(str(output_dir))
    board = f"  curves: tensorboard --logdir {path}/tensorboard"
    return [
        f"run directory: {path}" + (board if logging.tensorboard else ""),
        f"report of the run: megatron-dlm report {path}",
    ]
