"""The places a report is written to: metrics.jsonl, train.log, TensorBoard, Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol

import orjson

from megatron_dlm.runtime.files import write_whole
from megatron_dlm.training.log_entry import LogEntry


class Sink(Protocol):
    """One place for reports."""

    def write(self, entry: LogEntry) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one object per line, on disk before `write` returns to the loop."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Entries after `resume_step` belong to steps that will be taken again: they are cut."""
        if path.exists():
            _cut_after(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, entry: LogEntry) -> None:
        record = {"step": entry.step, "split": entry.split, **entry.values}
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def note(self, message: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._file.close()


def _cut_after(path: Path, resume_step: int) -> None:
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()  # empty, or what an interrupted write left
    kept: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        try:
            step = orjson.loads(line)["step"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not a metrics entry; repair it or move the file away"
            ) from error
        if step <= resume_step:
            kept.append(line + b"\n")
    if last or len(kept) < len(lines):
        write_whole(path, b"".join(kept))


class TextLog:
    """train.log: the lines of the console, with the time; grows over all starts of the run."""

    def __init__(self, path: Path, total_steps: int) -> None:
        self._total_steps = total_steps
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, entry: LogEntry) -> None:
        self.note(entry.line(self._total_steps))

    def note(self, message: str) -> None:
        self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardLog:
    """TensorBoard scalars split/name against the step."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Curves of steps that will be taken again are hidden by the viewer.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, entry: LogEntry) -> None:
        for name, value in entry.values.items():
            self._writer.add_scalar(f"{entry.split}/{name}", value, entry.step)
        self._writer.flush()

    def note(self, message: str) -> None:
        """Messages are not scalars."""

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """Weights & Biases, one run per run directory: a resumed run goes on in the same W&B run."""

    def __init__(self, project: str, output_dir: Path, config: Mapping[str, object]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"logging.wandb_project is {project} but the wandb package is not installed; "
                "run `pip install wandb` or remove the key"
            ) from error
        id_file = output_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=output_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(output_dir),
            config=dict(config),
        )
        # An explicit step axis: W&B's own counter refuses steps that are taken again.
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: LogEntry) -> None:
        values = {f"{entry.split}/{name}": value for name, value in entry.values.items()}
        self._run.log({"step": entry.step, **values})

    def note(self, message: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._run.finish()
