"""The places a report is written to: metrics.jsonl, train.log, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import yaml

from megatron_dlm.runtime.files import write_whole
from megatron_dlm.training.histogram import EDGES, Histogram
from megatron_dlm.training.log_entry import LogEntry


class Sink:
    """One place for reports; a kind of report that it has no room for is left out."""

    def write(self, entry: LogEntry) -> None:
        """Numbers of one step."""

    def note(self, message: str) -> None:
        """Something that is not a number."""

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Histograms by name."""

    def rewind(self, step: int) -> None:
        """The steps after this one will be taken again: forget them."""

    def close(self) -> None:
        """Nothing more will come."""


class MetricsFile(Sink):
    """metrics.jsonl: one object per line, on disk before `write` returns to the loop."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Entries after `resume_step` belong to steps that will be taken again: they are cut."""
        self._path = path
        self._open(resume_step)

    def write(self, entry: LogEntry) -> None:
        # A start that died before its first save leaves the validation that it began with.
        if (entry.step, entry.split) == self._last_of_before:
            return
        record = {"step": entry.step, "split": entry.split, **entry.values}
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def rewind(self, step: int) -> None:
        self._file.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()

    def _open(self, last_step: int) -> None:
        self._last_of_before = _cut_after(self._path, last_step) if self._path.exists() else None
        self._file = self._path.open("ab", buffering=0)


def _cut_after(path: Path, resume_step: int) -> tuple[int, str] | None:
    """Step and split of the last entry that is left."""
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()  # empty, or what an interrupted write left
    kept: list[bytes] = []
    last_kept = None
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
            is_kept = record["step"] <= resume_step
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not a metrics entry; repair it or move the file away"
            ) from error
        if is_kept:
            kept.append(line + b"\n")
            last_kept = (record["step"], record.get("split"))
    if last or len(kept) < len(lines):
        write_whole(path, b"".join(kept))
    return last_kept


class TextLog(Sink):
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


class TensorBoardLog(Sink):
    """TensorBoard: scalars split/name against the step, histograms, the configuration as text."""

    def __init__(self, directory: Path, resume_step: int, config: Mapping[str, object]) -> None:
        self._directory = directory
        self._open(resume_step)
        lines = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).splitlines()
        # Four spaces are code in Markdown.
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), resume_step)

    def write(self, entry: LogEntry) -> None:
        for name, value in entry.values.items():
            self._writer.add_scalar(f"{entry.split}/{name}", value, entry.step)
        self._writer.flush()

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        for name, histogram in found.items():
            _add_histogram(self._writer, name, histogram, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()

    def _open(self, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Curves of steps that will be taken again are hidden by the viewer.
        self._writer = SummaryWriter(str(self._directory), purge_step=last_step + 1)


def _add_histogram(writer: Any, name: str, histogram: Histogram, step: int) -> None:
    """The ranges from the first with values in it to the last."""
    filled = [place for place, count in enumerate(histogram.counts) if count]
    if not filled:
        return
    limits = [*EDGES, sys.float_info.max]
    first, last = filled[0], filled[-1]
    writer.add_histogram_raw(
        name,
        min=limits[max(first - 1, 0)],
        max=limits[min(last, len(EDGES) - 1)],
        num=sum(histogram.counts),
        sum=histogram.total,
        sum_squares=histogram.sum_of_squares,
        bucket_limits=limits[first : last + 1],
        bucket_counts=list(histogram.counts[first : last + 1]),
        global_step=step,
    )


class WandbLog(Sink):
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

    def close(self) -> None:
        self._run.finish()
