"""Opens everything a run needs: data, run directory, model, optimizer, checkpoints."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.checkpoint.state import TrainState
from megatron_dlm.checkpoint.store import Checkpointed, CheckpointStore, check_description, load
from megatron_dlm.checkpoint.verification import newest_sound
from megatron_dlm.config.architecture import weight_settings
from megatron_dlm.config.derive import step_tokens, total_steps
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check_schedule
from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.open_corpus import open_split
from megatron_dlm.data.storage.dataset import refuse_overlap
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.models.build import build_model
from megatron_dlm.models.moe_statistics import metric_names
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.metrics import Metrics
from megatron_dlm.training.moments import check_moments
from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_dlm.training.run_directory import RunDirectory
from megatron_dlm.training.step import Pass
from megatron_dlm.training.tensor_overlap import open_tensor_overlap
from megatron_dlm.training.validate import num_validation_samples, validation_micro_batches


@dataclass(frozen=True)
class Sources:
    """What is read: the corpora, the length they imply, and the checkpoint to continue from."""

    corpus: Corpus
    valid_corpus: Corpus | None
    num_steps: int
    checkpoint: Checkpoint | None
    messages: list[str]
    """What the user should know before the first step."""

    @property
    def start_step(self) -> int:
        """Finished updates of the checkpoint; 0 where there is none."""
        return self.checkpoint.step if self.checkpoint else 0


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    training: Pass
    validation: Pass | None
    validation_batches: list[TokenBatch]
    optimizer: MegatronOptimizer
    store: CheckpointStore
    start: TrainState


def open_sources(
    config: RunConfig, directory: RunDirectory, parallel: ParallelContext, held: ExitStack
) -> Sources:
    """Open the data on every rank and the run directory on rank 0; all ranks fail together.

    The lock of the run directory goes on `held`. It is made only for a run that has its data.
    """
    valid_corpus = None
    with parallel.failing_together():
        corpus = open_split(config, "train")
        if config.data.valid:
            valid_corpus = open_split(config, "valid")
            refuse_overlap(corpus.datasets, valid_corpus.datasets)
            valid_corpus.prepare()
        corpus.prepare()
        num_steps = total_steps(config, corpus.num_windows)
        check_schedule(config, num_steps)
    messages = _data_messages(config, corpus, num_steps)
    with parallel.failing_together():
        if parallel.is_main:
            held.enter_context(directory.lock())
            directory.open(config)
    checkpoint, warnings = newest_sound(
        directory.checkpoints, parallel, verify=config.checkpoint.verify
    )
    if checkpoint is None and config.train.start_from is not None:
        checkpoint = _checkpoint_of_other_run(config, parallel)
    with parallel.failing_together():
        if checkpoint is not None:
            check_description(checkpoint, describe(config, corpus))
            warnings = [*warnings, *check_moments(checkpoint, config)]
    messages += [f"warning: {warning}" for warning in warnings]
    if checkpoint is not None:
        messages.append(f"continuing from {checkpoint.path}")
    return Sources(corpus, valid_corpus, num_steps, checkpoint, messages)


def _checkpoint_of_other_run(config: RunConfig, parallel: ParallelContext) -> Checkpoint:
    """What `train.start_from` names. Collective; raises ValueError on every rank."""
    assert config.train.start_from is not None
    found: Checkpoint | None = None
    with parallel.failing_together():
        if parallel.is_main:
            verify = config.checkpoint.verify == "checksums"
            try:
                found = find_checkpoint(Path(config.train.start_from), verify=verify)
            except ValueError as error:
                raise ValueError(f"train.start_from: {error}") from None
            theirs = found.manifest.get("config", {}).get("train", {}).get("global_batch_size")
            ours = config.train.global_batch_size
            if found.step > 0 and theirs != ours:
                raise ValueError(
                    f"train.start_from {found.path} was made with train.global_batch_size "
                    f"{theirs}, this run has {ours}: its step {found.step} would be another place "
                    "in the data; use the same"
                )
    found = parallel.from_main(found)
    assert found is not None, "else rank 0 has raised"
    return found


def _data_messages(config: RunConfig, corpus: Corpus, num_steps: int) -> list[str]:
    """What the run will take from each dataset, and how much of its windows is text."""
    rows = corpus.report(num_steps * config.train.global_batch_size)
    messages = [row.line() for row in rows]
    if config.data.packing != "concat":
        messages.append(
            f"data.packing {config.data.packing}: {corpus.text_share:.2%} of the window is text"
        )
    return messages


def describe(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint of this run says about itself; a run continues only from its equal."""
    return {
        "model": weight_settings(config.model),
        "data": {"digest": corpus.digest},
    }


def run_facts(
    config: RunConfig, sources: Sources, device: Device, parallel: ParallelContext
) -> dict[str, Any]:
    """What run.json says about this start of the run."""
    flops = training_flops_per_token(config.model, config.objective).total
    return {
        "device": device.name,
        "world_size": parallel.world_size,
        "data_parallel_size": parallel.data.size,
        "num_parameters": count_parameters(config.model).total,
        "training_flops_per_token": flops,
        "training_flops": flops * sources.num_steps * step_tokens(config),
        "steps": sources.num_steps,
        "unique_tokens": sources.corpus.unique_tokens,
        "text_share": sources.corpus.text_share,
        "data": [
            asdict(row)
            for row in sources.corpus.report(sources.num_steps * config.train.global_batch_size)
        ],
        "data_digest": sources.corpus.digest,
        "resumed_from_step": sources.checkpoint.step if sources.checkpoint else None,
    }


def open_run(
    config: RunConfig,
    sources: Sources,
    directory: RunDirectory,
    *,
    device: Device,
    parallel: ParallelContext,
) -> Run:
    """Build model and optimizer, and restore them from the checkpoint if there is one."""
    seed_dropout(config.train.seed, 0, parallel)  # building already forks the random state
    with parallel.failing_together():
        chunks = build_model(
            config.model,
            config.parallel,
            config.objective,
            precision=config.train.precision,
            seed=config.train.seed,
            device=device,
            parallel=parallel,
            optimizer=config.optimizer,
            fp8=config.fp8,
        )
    open_tensor_overlap(config)
    wrapped = wrap_data_parallel(chunks, config.parallel, parallel)
    optimizer = build_optimizer(
        wrapped,
        config.optimizer.for_batch(config.train.global_batch_size),
        overlap_param_gather=config.parallel.overlap_param_gather,
        parallel_config=config.parallel,
    )
    subject = Checkpointed(wrapped, optimizer, parallel)
    description = {
        **describe(config, sources.corpus),
        "config": asdict(config),
        "num_parameters": count_parameters(config.model).total,
    }
    store = CheckpointStore(directory.checkpoints, config.checkpoint, subject, description)
    start = load(sources.checkpoint, subject) if sources.checkpoint else TrainState(step=0)
    training = _open_pass(config, subject, device, batch_size=config.train.global_batch_size)
    training.metrics.restore(start.pending_metrics, owner=parallel.is_main)
    validation, validation_batches = None, []
    if sources.valid_corpus is not None:
        num_samples = num_validation_samples(config, sources.valid_corpus)
        validation = _open_pass(config, subject, device, batch_size=num_samples, training=False)
        validation_batches = validation_micro_batches(config, sources.valid_corpus, parallel)
    return Run(training, validation, validation_batches, optimizer, store, start)


def _open_pass(
    config: RunConfig,
    subject: Checkpointed,
    device: Device,
    *,
    batch_size: int,
    training: bool = True,
) -> Pass:
    assert config.model.vocab_size is not None, "resolve() fills vocab_size"
    objective = build_objective(
        config.objective,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.objective.mask_token_id,
        batch_size=batch_size,
        training=training,
        num_noise_buckets=0 if training else config.logging.noise_level_buckets,
    )
    of_routers = metric_names(config.model) if training else ()
    return Pass(
        chunks=subject.chunks,
        objective=objective,
        seed=config.train.seed if training else config.validation.seed,
        stream=Stream.TRAINING if training else Stream.VALIDATION,
        device=device,
        parallel=subject.parallel,
        metrics=Metrics((*objective.metric_names, *of_routers), device.torch_device),
        loss_chunk_slots=config.train.loss_chunk_slots,
    )
