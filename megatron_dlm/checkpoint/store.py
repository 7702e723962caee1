"""Saves and loads checkpoints with Megatron's dist_checkpointing, on any parallel layout.

A checkpoint is written under a temporary name and renamed when every rank has finished;
`latest_checkpointed_iteration.txt` follows last, so a killed save is never mistaken for whole.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.file_writing import write_beside, write_now
from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.checkpoint.safe_loading import safe_loading
from megatron_dlm.checkpoint.state import (
    TrainState,
    model_state,
    optimizer_state,
    restore_optimizer,
)
from megatron_dlm.checkpoint.tensor_reader import stored_names
from megatron_dlm.checkpoint.writer_report import WriterReport
from megatron_dlm.config.architecture import ModelConfig, weight_settings
from megatron_dlm.config.schema import CheckpointConfig
from megatron_dlm.models.build import LanguageModel
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.parallel import ParallelContext

_DISK_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpointed:
    """What is saved and restored."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    parallel: ParallelContext

    @property
    def models(self) -> list[LanguageModel]:
        """The chunks without their data-parallel wrapper."""
        return [chunk.module for chunk in self.chunks]


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        subject: Checkpointed,
        description: Mapping[str, Any],
    ) -> None:
        """`description` goes into every manifest: it must say what the weights are."""
        self._root = root
        self._config = config
        self._subject = subject
        self._description = dict(description)
        # Where writers report to; Megatron Core would start a server process for it.
        self._report = filesystem_async._results_queue = WriterReport()
        self._queue = AsyncCallsQueue(persistent=False) if config.asynchronous else None

    def save(self, state: TrainState) -> None:
        """Write one checkpoint; asynchronous if so configured. Collective.

        Raises ValueError on every rank when the disk is too full or refuses to be written.
        """
        self.wait()
        parallel = self._subject.parallel
        model = model_state(self._subject.models, parallel)
        optimizer = optimizer_state(self._subject.optimizer, model, parallel, is_loading=False)
        # A name of its own: a writer that outlived a killed run may still write under the old one.
        name = f"{retention.directory_name(state.step)}.{parallel.from_main(uuid.uuid4().hex[:8])}"
        unfinished = self._root / f"{name}{retention.UNFINISHED_SUFFIX}"
        with parallel.failing_together():
            if parallel.is_main:
                self._make_room(unfinished)
        self._report.expect(unfinished)
        with self._explaining_failures():
            request = dist_checkpointing.save(
                {**model, **optimizer, "train_state": asdict(state)},
                str(unfinished),
                async_sharded_save=True,
            )
            if self._queue is None:
                write_now(request)
        if self._queue is None:
            self._publish(unfinished, state.step)
        else:
            request.add_finalize_fn(lambda: self._publish(unfinished, state.step))
            write_beside(request, self._queue)

    def finish_if_written(self) -> None:
        """Publish an asynchronous save if it is written. Collective while one is under way."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._explaining_failures():
                self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait for the asynchronous save under way, if any. Collective."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._explaining_failures():
                self._queue.maybe_finalize_async_calls(blocking=True)

    def _make_room(self, unfinished: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        retention.remove_unfinished(self._root)  # of saves that failed
        parameters = int(self._description["num_parameters"])
        # Weights in training precision (at most 4 bytes), fp32 weights and two fp32 moments.
        needed = 16 * parameters + _DISK_MARGIN_BYTES
        free = shutil.disk_usage(self._root).free
        if free < needed:
            raise ValueError(
                f"{self._root}: {free / 1e9:.2f} GB are free but a checkpoint takes up to "
                f"{needed / 1e9:.2f} GB; free some space and start again: the run continues from "
                "its newest checkpoint"
            )
        unfinished.mkdir()

    def _publish(self, unfinished: Path, step: int) -> None:
        parallel = self._subject.parallel
        sums: list[dict[str, str]] = [{}] * parallel.world_size
        dist.all_gather_object(sums, self._report.checksums, group=parallel.control_group)
        with parallel.failing_together():
            if parallel.is_main:
                content = {"step": step, "world_size": parallel.world_size, **self._description}
                checksums = {name: value for part in sums for name, value in part.items()}
                retention.write_manifest(unfinished, content, checksums)
                retention.publish(unfinished, step)
                retention.remove_old(
                    self._root,
                    keep_last=self._config.keep_last,
                    keep_every_steps=self._config.keep_every_steps,
                )

    @contextlib.contextmanager
    def _explaining_failures(self) -> Iterator[None]:
        """Turn what the writers raise, mostly for want of disk space, into one line."""
        try:
            yield
        except CheckpointException as error:  # on all ranks; only rank 0 knows the reasons
            reasons = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
            raise AgreedError(self._cannot_write("; ".join(reasons))) from error
        except RuntimeError as error:  # torch.save of the common part, on rank 0
            if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
                raise ValueError(self._cannot_write(str(error))) from error
            raise

    def _cannot_write(self, reason: str) -> str:
        return (
            f"{self._root}: the checkpoint could not be written ({reason}); free disk space or "
            "mend the file system and start again: the run continues from its newest checkpoint"
        )


def load(checkpoint: Checkpoint, subject: Checkpointed) -> TrainState:
    """Restore weights, moments and counters from a checkpoint of any layout. Collective.

    Of an imported checkpoint only the weights: training starts with fresh moments.
    """
    if checkpoint.manifest.get(retention.WEIGHTS_ONLY):
        load_weights(checkpoint, subject.models, subject.parallel)
        subject.optimizer.reload_model_params()
        return TrainState(step=checkpoint.step)
    model = model_state(subject.models, subject.parallel)
    optimizer = optimizer_state(subject.optimizer, model, subject.parallel, is_loading=True)
    asked = {**without_absent_extras(model, checkpoint.path), **optimizer}
    loaded = _read(checkpoint.path, asked, subject.parallel)
    _restore_weights(subject.models, loaded)
    state = TrainState(**loaded["train_state"])
    restore_optimizer(subject.optimizer, loaded, state.step)
    return state


def load_weights(
    checkpoint: Checkpoint, models: Sequence[LanguageModel], parallel: ParallelContext
) -> None:
    """Restore only the weights. Collective."""
    # Left out: what layer implementations keep besides weights, such as FP8 scales.
    state = {
        name: {key: place for key, place in chunk.items() if not key.endswith("_extra_state")}
        for name, chunk in model_state(models, parallel).items()
    }
    _restore_weights(models, _read(checkpoint.path, state, parallel))


def without_absent_extras(model: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What to ask of a checkpoint: of what layers keep besides weights, only what it holds.

    Transformer Engine's layers keep FP8 scales, which a checkpoint of other layers does not have;
    they start afresh.
    """
    if not any(key.endswith("_extra_state") for chunk in model.values() for key in chunk):
        return dict(model)
    names = stored_names(path)
    return {
        name: {
            key: place
            for key, place in chunk.items()
            if not key.endswith("_extra_state") or place.key in names
        }
        for name, chunk in model.items()
    }


def _restore_weights(models: Sequence[LanguageModel], loaded: Mapping[str, Any]) -> None:
    """Copy loaded weights into all model chunks."""
    for number, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{number}"], strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        assert not missing, f"without a value: {missing}"
        assert not unexpected, f"without a place: {unexpected}"


def check_description(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """Raise ValueError if the checkpoint is of another model, or was trained on other data.

    `expected` as given to `CheckpointStore`: the sections `model` (names the first differing value)
    and `data` (a digest, which an imported checkpoint has none of).
    """
    stored = checkpoint.manifest
    # What a checkpoint does not name is an option that came later: it had the default then.
    made_with = {**weight_settings(ModelConfig()), **stored["config"]["model"], **stored["model"]}
    for name, value in expected["model"].items():
        if made_with[name] != value:
            raise ValueError(
                f"{checkpoint.path} was made with model.{name} {made_with[name]}, this "
                f"run has {value}; use the same value or another train.output_dir"
            )
    if not stored.get(retention.WEIGHTS_ONLY) and stored["data"] != expected["data"]:
        raise ValueError(
            f"{checkpoint.path} was trained on other data: the shards of data.train, their weights "
            "or the unique subset have changed; restore them or choose another train.output_dir"
        )


def _read(path: Path, sharded: dict[str, Any], parallel: ParallelContext) -> dict[str, Any]:
    strategy = get_default_load_sharded_strategy(str(path))
    if parallel.data.size > 1:
        # Each DP rank reads a part and they exchange, instead of all reading everything.
        strategy = FullyParallelLoadStrategyWrapper(strategy, parallel.groups.dp_cp)
    try:
        with safe_loading():
            return dist_checkpointing.load(sharded, str(path), sharded_strategy=strategy)
    except CheckpointException as error:  # on all ranks
        reason = next(iter(error.failures.values()))[0] if error.failures else error
        raise AgreedError(_cannot_read(path, reason)) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(_cannot_read(path, error)) from error


def _cannot_read(path: Path, reason: BaseException) -> str:
    # The first sentence; PyTorch's further advice is to load without its checks.
    summary = str(reason).split("\n")[0].split(". ")[0]
    return f"{path} cannot be read ({summary}); move it away to continue from an older checkpoint"
