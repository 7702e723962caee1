"""The training loop. Read this first: every line is one verb on one object.

sources (corpora, run directory) -> run (model, optimizer, checkpoints) -> steps, each of them
batches -> train_step -> log -> validate -> save, until the last step or a stop request.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict

from megatron_dlm.checkpoint.state import TrainState
from megatron_dlm.config.derive import step_tokens
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.loader import batches
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.optimizer import set_learning_rate
from megatron_dlm.training.run_directory import RunDirectory
from megatron_dlm.training.run_log import RunLog, open_run_log
from megatron_dlm.training.schedule import learning_rate
from megatron_dlm.training.setup import Run, Sources, open_run, open_sources, run_facts
from megatron_dlm.training.signals import StopRequest
from megatron_dlm.training.step import train_step
from megatron_dlm.training.throughput import Throughput
from megatron_dlm.training.validate import validate


def train(config: RunConfig, device: Device, parallel: ParallelContext) -> None:
    """Train until the configured length or until asked to stop; either way the state is saved.

    Raises ValueError on every rank for what the user can mend.
    """
    directory = RunDirectory(config.train.output_dir)
    sources = open_sources(config, directory, parallel)
    run = open_run(config, sources, directory, device=device, parallel=parallel)
    with parallel.failing_together():
        if parallel.is_main:
            directory.write_run_facts(run_facts(config, sources, device, parallel))
        log = open_run_log(
            directory.path,
            config.logging,
            is_main=parallel.is_main,
            total_steps=sources.num_steps,
            resume_step=run.start.step,
            config=asdict(config),
        )
    with log, StopRequest(parallel.control_group) as stop:
        for message in sources.messages:
            log.note(message)
        try:
            reason = _loop(config, sources, run, log, stop)
        except AgreedError as error:
            log.note(f"stopped: {error}")
            run.store.wait()  # an asynchronous save of an earlier step is still good
            raise
        run.store.wait()
        log.note(f"{reason}: saved; the same command goes on from here" if reason else "finished")


def _loop(
    config: RunConfig, sources: Sources, run: Run, log: RunLog, stop: StopRequest
) -> str | None:
    """All steps; returns the reason if it was asked to stop before the last one."""
    throughput = Throughput(config, run.training.device, run.training.parallel)
    with closing(_steps(config, sources, run)) as steps:
        for step in range(run.start.step + 1, sources.num_steps + 1):  # counts finished updates
            micro_batches = throughput.wait_for(steps)
            rate = learning_rate(step, sources.num_steps, config.optimizer, config.schedule)
            set_learning_rate(run.optimizer, rate)
            if config.model.hidden_dropout or config.model.attention_dropout:
                seed_dropout(config.train.seed, step, run.training.parallel)
            grad_norm = train_step(run.training, run.optimizer, micro_batches)
            throughput.step_done()
            _refuse_non_finite(grad_norm, step)
            is_last = step == sources.num_steps
            reason = None if is_last else stop.poll()

            place = _place(config, sources, step)
            if is_last or step % config.logging.interval_steps == 0:
                losses = {**run.training.metrics.reduce(), "grad_norm": grad_norm, "lr": rate}
                log.log(step, "train", {**losses, **place, **throughput.report()})
            if run.validation and (is_last or step % config.validation.interval_steps == 0):
                losses = validate(run.validation, run.validation_batches)
                log.log(step, "valid", {**losses, **place})
            run.store.finish_if_written()
            if is_last or reason or step % config.checkpoint.interval_steps == 0:
                run.store.save(TrainState(step, run.training.metrics.pending()))
            if reason:
                return reason
    return None


def _steps(
    config: RunConfig, sources: Sources, run: Run
) -> Generator[list[TokenBatch], None, None]:
    """This rank's micro-batches of every step still to come."""
    parallel, objective = run.training.parallel, run.training.objective
    micro_batches_of_steps = batches(
        sources.corpus,
        start_step=run.start.step,
        num_steps=sources.num_steps - run.start.step,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=parallel.data.rank,
        data_size=parallel.data.size,
    )
    for step, micro_batches in enumerate(micro_batches_of_steps, start=run.start.step):
        length = objective.step_length(
            step,
            seq_length=config.model.seq_length,
            multiple=config.objective.variable_length_multiple,
            seed=config.train.seed,
        )
        yield [batch.crop(length) for batch in micro_batches]


def _place(config: RunConfig, sources: Sources, step: int) -> dict[str, float]:
    """How far the run is: tokens with repeats, passes over the unique tokens, those seen so far."""
    progress = sources.corpus.progress(step * config.train.global_batch_size)
    return {"tokens": step * step_tokens(config), **progress}


def _refuse_non_finite(grad_norm: float, step: int) -> None:
    """The norm is the same on all ranks, so all stop here; nothing broken is saved."""
    if not math.isfinite(grad_norm):
        raise AgreedError(
            f"the gradient norm is {grad_norm} at step {step}; the newest checkpoint is untouched: "
            "start again from it with a lower optimizer.lr, more schedule.warmup_steps or "
            "train.precision fp32 in another train.output_dir"
        )
