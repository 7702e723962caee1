"""Back to the newest checkpoint, inside the running processes, and on without the bad batches."""

from __future__ import annotations

from dataclasses import replace

from megatron_dlm.checkpoint.retention import WEIGHTS_ONLY
from megatron_dlm.checkpoint.store import Checkpointed, load
from megatron_dlm.checkpoint.verification import newest_sound
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.training.bad_steps import BadStep
from megatron_dlm.training.optimizer import parameters_gathered
from megatron_dlm.training.run_directory import RunDirectory
from megatron_dlm.training.setup import Run
from megatron_dlm.training.skipped_batches import batch_of, skipping


class Rollbacks:
    """All rollbacks of one start of the run."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        self._count = 0

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
        if self._count == recovery.max_rollbacks:
            raise AgreedError(
                f"{bad.reason}, after {self._count} rollbacks (recovery.max_rollbacks); lower "
                "optimizer.lr in another train.output_dir"
            )
        self._count += 1
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
        start = replace(saved, skipped=skipping(run.start.skipped, first, last))
        run.training.metrics.restore(start.pending_metrics, owner=parallel.is_main)
        message = (
            f"{bad.reason}: back to step {saved.step}, batches {first} to {last} are left out "
            f"(rollback {self._count} of {self._config.recovery.max_rollbacks})"
        )
        return replace(run, start=start), [*warnings, message]
