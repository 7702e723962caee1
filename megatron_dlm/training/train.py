"""The training loop. Read this first: every line is one verb on one object.

sources (corpora, run directory) -> run (model, optimizer, checkpoints) -> steps, each of them
batches -> train_step -> judge -> log -> validate -> save, until the last step or a stop request.
After a bad step the run may go back to its newest checkpoint (`rollback`).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

from megatron_dlm.checkpoint.retention import directory_name
from megatron_dlm.checkpoint.state import TrainState
from megatron_dlm.config.derive import step_tokens
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.loader import batches
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.bad_steps import BadStep, StepJudge
from megatron_dlm.training.inspection import Inspection
from megatron_dlm.training.journal import Journal
from megatron_dlm.training.optimizer import parameters_gathered, set_learning_rate
from megatron_dlm.training.rollback import Rollbacks
from megatron_dlm.training.run_directory import RunDirectory
from megatron_dlm.training.run_log import RunLog, open_run_log
from megatron_dlm.training.schedule import learning_rate
from megatron_dlm.training.setup import Run, Sources, open_run, open_sources, run_facts
from megatron_dlm.training.signals import StopSignals
from megatron_dlm.training.skipped_batches import batch_of, stretches
from megatron_dlm.training.stack_report import stack_report
from megatron_dlm.training.status import job_number, restart_count
from megatron_dlm.training.step import train_step
from megatron_dlm.training.stop_vote import StopVote
from megatron_dlm.training.stragglers import Stragglers
from megatron_dlm.training.throughput import Throughput
from megatron_dlm.training.validate import validate

# The first step also compiles and connects; validation and saves have no fixed length.
_LONG = 3.0


@dataclass(frozen=True)
class _Training:
    """What a start of a run works with, besides model and data."""

    config: RunConfig
    sources: Sources
    log: RunLog
    vote: StopVote
    journal: Journal
    rollbacks: Rollbacks


def train(
    config: RunConfig,
    device: Device,
    parallel: ParallelContext,
    *,
    signals: StopSignals | None = None,
    journal: Journal | None = None,
) -> None:
    """Train until the configured length or until asked to stop; either way the state is saved.

    Raises ValueError on every rank for what the user can mend.
    """
    journal = journal or Journal()
    directory = RunDirectory(config.train.output_dir)
    with ExitStack() as stack:
        vote = StopVote(signals or stack.enter_context(StopSignals()), parallel.control_group)
        sources = open_sources(config, directory, parallel, stack)
        with parallel.failing_together():
            journal.open(directory.path, step=sources.start_step, is_main=parallel.is_main)
        if reason := vote.now():
            return _leave_before_the_start(reason, journal, parallel)
        run = open_run(config, sources, directory, device=device, parallel=parallel)
        if reason := vote.now():
            return _leave_before_the_start(reason, journal, parallel)
        log = _open_log(config, sources, directory, run, device)
        stack.callback(log.close)
        journal.events = log.events
        rollbacks = Rollbacks(config, directory, parallel)
        _run(_Training(config, sources, log, vote, journal, rollbacks), run)


def _leave_before_the_start(reason: str, journal: Journal, parallel: ParallelContext) -> None:
    journal.status("preempted", reason)
    if parallel.is_main:
        print(f"{reason}: stopped before the first step; the same command goes on", flush=True)


def _open_log(
    config: RunConfig, sources: Sources, directory: RunDirectory, run: Run, device: Device
) -> RunLog:
    parallel = run.training.parallel
    stack = stack_report(
        chunks=run.training.chunks,
        optimizer=run.optimizer,
        device=device,
        loss_chunk_slots=config.train.loss_chunk_slots,
    )
    with parallel.failing_together():
        if parallel.is_main:
            facts = run_facts(config, sources, device, parallel)
            directory.write_run_facts({**facts, "stack": stack})
        log = open_run_log(
            directory.path,
            config.logging,
            is_main=parallel.is_main,
            total_steps=sources.num_steps,
            resume_step=run.start.step,
            config=asdict(config),
        )
    job = [f"Slurm job {job_number()}, restart {restart_count()}"] if job_number() else []
    parts = [f"{part}: {text}" for part, text in stack.items()]
    for message in [*job, *sources.messages, *parts]:
        log.note(message)
    return log


def _run(training: _Training, run: Run) -> None:
    """All steps, over every rollback."""
    log, journal, reason = training.log, training.journal, None
    try:
        run, messages = training.rollbacks.resume(run)
        for message in messages:
            log.note(message)
        if run.start.validation_is_due:
            reason = _validate(training, run, run.start.step)
        while reason is None:
            try:
                reason = _loop(training, run)
                break
            except BadStep as bad:
                journal.event("spike", step=bad.step, reason=bad.reason)
                run, messages = training.rollbacks.after(bad, run)
                _report_rollback(training, run, bad, messages)
    except AgreedError as error:
        log.note(f"stopped: {error}")
        run.store.wait()  # an asynchronous save of an earlier step is still good
        raise
    run.store.wait()
    if reason:
        journal.event("signal", name=reason)
    log.note(f"{reason}: saved; the same command goes on from here" if reason else "finished")
    journal.end("preempted" if reason else "finished", reason)


def _loop(training: _Training, run: Run) -> str | None:
    """All steps; returns the reason if it was asked to stop before the last one."""
    config, sources, journal, log = (
        training.config,
        training.sources,
        training.journal,
        training.log,
    )
    parallel = run.training.parallel
    throughput = Throughput(config, run.training.device, parallel)
    inspection = Inspection(config.logging, run.optimizer, run.training)
    judge = StepJudge(config.recovery, run.start)
    stragglers = Stragglers(run.training.chunks, parallel, factor=config.recovery.straggler_factor)
    with closing(_steps(config, sources, run)) as steps, stragglers:
        for step in range(run.start.step + 1, sources.num_steps + 1):  # counts finished updates
            journal.doing(f"step {step}", patience=_LONG if step == run.start.step + 1 else 1)
            micro_batches = throughput.wait_for(steps)
            rate = learning_rate(step, sources.num_steps, config.optimizer, config.schedule)
            set_learning_rate(run.optimizer, rate)
            if config.model.hidden_dropout or config.model.attention_dropout:
                seed_dropout(config.train.seed, step, parallel)
            grad_norm = train_step(
                run.training, run.optimizer, micro_batches, before_update=inspection.of(step)
            )
            throughput.step_done()
            judge.judge(step, grad_norm, run.training.metrics)
            journal.step = step
            is_last = step == sources.num_steps

            place = _place(config, sources, run, step)
            if is_last or step % config.logging.interval_steps == 0:
                _name_slow_ranks(training, stragglers, throughput)
                losses = {**run.training.metrics.reduce(), "grad_norm": grad_norm, "lr": rate}
                judge.reported()
                extras = {**throughput.report(), **inspection.report()}
                log.log(step, "train", {**losses, **place, **extras})
                log.histograms(step, inspection.histograms())
            cut_by = None
            if is_last or step % config.validation.interval_steps == 0:
                cut_by = _validate(training, run, step)
            reason = cut_by or (None if is_last else training.vote.poll())
            journal.doing(f"the save after step {step}", patience=_LONG)
            run.store.finish_if_written()
            if is_last or reason or step % config.checkpoint.interval_steps == 0:
                _save(training, run, judge, validation_is_due=cut_by is not None)
            if reason:
                return reason
    return None


def _validate(training: _Training, run: Run, step: int) -> str | None:
    """Report the loss on held-out text; the name of the signal where one cut that short."""
    if run.validation is None:
        return None
    vote, reason = training.vote, None

    def is_stopped() -> bool:
        nonlocal reason
        reason = vote.poll()
        return reason is not None

    training.journal.doing(f"the validation after step {step}", patience=_LONG)
    losses = validate(run.validation, run.validation_batches, is_stopped=is_stopped)
    if losses is None:
        training.log.note(f"{reason}: the validation after step {step} waits for the next start")
        return reason
    place = _place(training.config, training.sources, run, step)
    training.log.log(step, "valid", {**losses, **place})
    return None


def _name_slow_ranks(training: _Training, stragglers: Stragglers, throughput: Throughput) -> None:
    for straggler in stragglers.report(throughput.num_steps, throughput.waited_seconds):
        training.log.note(f"warning: {straggler}")
        training.journal.event("straggler", **asdict(straggler))


def _save(
    training: _Training, run: Run, judge: StepJudge, *, validation_is_due: bool = False
) -> None:
    journal, started = training.journal, time.perf_counter()
    state = TrainState(
        journal.step,
        pending_metrics=run.training.metrics.pending(),
        skipped=run.start.skipped,
        recent_losses=judge.recent_losses,
        validation_is_due=validation_is_due,
    )
    with parameters_gathered(run.training.chunks):  # each rank has updated only its share
        run.store.save(state)
    journal.event(
        "save",
        path=f"checkpoints/{directory_name(journal.step)}",
        seconds=time.perf_counter() - started,
        asynchronous=training.config.checkpoint.asynchronous,
    )
    journal.status("running")


def _report_rollback(training: _Training, run: Run, bad: BadStep, messages: list[str]) -> None:
    """The reports of the steps that are taken again go away."""
    log, journal = training.log, training.journal
    journal.step = run.start.step
    log.rewind(run.start.step)
    for message in messages:
        log.note(message)
    journal.event(
        "rollback",
        step=bad.step,
        to_step=run.start.step,
        reason=bad.reason,
        skipped=run.start.skipped,
    )


def _steps(
    config: RunConfig, sources: Sources, run: Run
) -> Generator[list[TokenBatch], None, None]:
    """This rank's micro-batches of every step still to come."""
    parallel, objective = run.training.parallel, run.training.objective
    for first, count in stretches(run.start.step, sources.num_steps, run.start.skipped):
        micro_batches_of_steps = batches(
            sources.corpus,
            start_step=first - 1,
            num_steps=count,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=parallel.data.rank,
            data_size=parallel.data.size,
        )
        for number, micro_batches in enumerate(micro_batches_of_steps, start=first - 1):
            length = objective.step_length(
                number,
                seq_length=config.model.seq_length,
                multiple=config.objective.variable_length_multiple,
                seed=config.train.seed,
            )
            yield [batch.crop(length) for batch in micro_batches]


def _place(config: RunConfig, sources: Sources, run: Run, step: int) -> dict[str, float]:
    """How far the run is: tokens with repeats, passes over the unique tokens, those seen so far."""
    batch = batch_of(step, run.start.skipped)
    progress = sources.corpus.progress(batch * config.train.global_batch_size)
    return {"tokens": step * step_tokens(config), **progress}
