"""Back to the newest checkpoint, inside the running processes, and on without the bad batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.retention import WEIGHTS_ONLY
from megatron_dlm.checkpoint.store import Checkpointed, load
from megatron_dlm.checkpoint.verification import newest_sound
from megatron_dlm.config.json_text import parse_json
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.training.bad_steps import BadStep
from megatron_dlm.training.optimizer import parameters_gathered
from megatron_dlm.training.run_directory import RunDirectory
from megatron_dlm.training.setup import Run
from megatron_dlm.training.skipped_batches import batch_of, skipping

ROLLBACKS_FILE = "rollbacks.json"


class Rollbacks:
    """All rollbacks of a run, over all its starts: each is in rollbacks.json before it is built
    upon, so that a start that dies after it neither forgets it nor takes it again."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, parallel: ParallelContext
    ) -> None:
        """Collective. Raises AgreedError where the file is damaged."""
        self._config = config
        self._directory = directory
        self._parallel = parallel
        self._past: list[dict[str, Any]] = []
        with parallel.failing_together():
            if parallel.is_main:
                self._past = _read(directory.path / ROLLBACKS_FILE)
        self._past = parallel.from_main(self._past)

    def resume(self, run: Run) -> tuple[Run, list[str]]:
        """The run without the batches that a rollback after its checkpoint has left out."""
        later = [past for past in self._past if past["to_step"] >= run.start.step]
        if not later:
            return run, []
        skipped = later[-1]["skipped"]
        message = f"batches {skipped} are left out, as an earlier start decided (rollback)"
        return replace(run, start=replace(run.start, skipped=skipped)), [message]

    def after(self, bad: BadStep, run: Run) -> tuple[Run, list[str]]:
        """The run as it was saved last, without the batches since then, and what to tell the user.

        Collective.
        Raises AgreedError where the run is to end instead, or cannot go back.
        """
        recovery = self._config.recovery
        if recovery.on_bad_step == "stop":
            raise AgreedError(
                f"{bad.reason}; the newest checkpoint is untouched: start again from it with a "
                "lower optimizer.lr, more schedule.warmup_steps or train.precision fp32 in another "
                "train.output_dir, or set recovery.on_bad_step rollback"
            )
        if len(self._past) >= recovery.max_rollbacks:
            raise AgreedError(
                f"{bad.reason}, after {len(self._past)} rollbacks of this run "
                "(recovery.max_rollbacks); lower optimizer.lr in another train.output_dir"
            )
        return self._go_back(bad, run)

    def _go_back(self, bad: BadStep, run: Run) -> tuple[Run, list[str]]:
        parallel = run.training.parallel
        run.store.wait()  # an asynchronous save of an earlier step is still good
        checkpoint, warnings = newest_sound(
            self._directory.checkpoints, parallel, verify=self._config.checkpoint.verify
        )
        if checkpoint is None or checkpoint.manifest.get(WEIGHTS_ONLY):
            raise AgreedError(
                f"{bad.reason}, and there is no checkpoint of this run to go back to; save more "
                "often (checkpoint.interval_steps) or lower optimizer.lr"
            )
        subject = Checkpointed(run.training.chunks, run.optimizer, parallel)
        with parameters_gathered(run.training.chunks):
            saved = load(checkpoint, subject)
        steps = (saved.step + 1, bad.step)
        first, last = (batch_of(step, run.start.skipped) for step in steps)
        skipped = skipping(run.start.skipped, first, last)
        # This process has made up for a validation that was due then.
        start = replace(saved, skipped=skipped, validation_is_due=False)
        self._remember({"step": bad.step, "to_step": saved.step, "skipped": skipped})
        run.training.metrics.restore(start.pending_metrics, owner=parallel.is_main)
        message = (
            f"{bad.reason}: back to step {saved.step}, batches {first} to {last} are left out "
            f"(rollback {len(self._past)} of {self._config.recovery.max_rollbacks})"
        )
        return replace(run, start=start), [*warnings, message]

    def _remember(self, rollback: dict[str, Any]) -> None:
        self._past.append(rollback)
        with self._parallel.failing_together():
            if self._parallel.is_main:
                text = json.dumps(self._past, indent=1) + "\n"
                write_whole(self._directory.path / ROLLBACKS_FILE, text)


def _read(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError for what this module did not write."""
    if not path.exists():
        return []
    try:
        found = parse_json(path.read_bytes())
        return [
            {
                "step": int(past["step"]),
                "to_step": int(past["to_step"]),
                "skipped": [[int(first), int(last)] for first, last in past["skipped"]],
            }
            for past in found
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); restore it: without it the run would take other "
            "batches than before"
        ) from None
