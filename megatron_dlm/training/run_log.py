"""The log of a run: `open_run_log` on every rank, files and console on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from megatron_dlm.config.schema import LoggingConfig
from megatron_dlm.training.console import ConsoleLog
from megatron_dlm.training.log_entry import LogEntry
from megatron_dlm.training.log_sinks import MetricsFile, Sink, TensorBoardLog, TextLog, WandbLog


class RunLog:
    """Gives every report to all its sinks; without sinks (ranks other than 0) it does nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Report `values` of `split` (train or valid) after update number `step`."""
        entry = LogEntry(step, split, dict(values))
        for sink in self._sinks:
            sink.write(entry)

    def note(self, message: str) -> None:
        """Tell the user something that is not a number."""
        for sink in self._sinks:
            sink.note(message)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    `config` is the resolved configuration, for Weights & Biases. Raises ValueError or OSError on
    rank 0 if a sink cannot be opened.
    """
    if not is_main:
        return RunLog()
    sinks: list[Sink] = [
        MetricsFile(output_dir / "metrics.jsonl", resume_step),
        TextLog(output_dir / "train.log", total_steps),
    ]
    if logging.tensorboard:
        sinks.append(TensorBoardLog(output_dir / "tensorboard", resume_step))
    if logging.wandb_project is not None:
        sinks.append(WandbLog(logging.wandb_project, output_dir, config or {}))
    # Last: nothing that can fail comes after the live view has taken the terminal.
    sinks.append(ConsoleLog(output_dir.name, total_steps, resume_step))
    return RunLog(sinks)
