"""Worker processes that run the jobs of a preprocess run, each one job after the other.

They are spawned, never forked: this process has threads. A worker stops where nobody reads its
reports any more, so none outlives this process or an error of another, and no signal ever comes in
the middle of a shard.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.input_plan import Job
from megatron_dlm.data.preprocessing.recipe import Recipe
from megatron_dlm.data.preprocessing.shard_job import JobRunner, Progress
from megatron_dlm.data.preprocessing.stop_request import STOP_SIGNALS
from megatron_dlm.runtime.errors import is_users
from megatron_dlm.runtime.processes import end_with_parent, num_cores

# A worker notices within a batch that it has to end; one that does not is killed.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_Task = tuple[int, Job]


class Report(NamedTuple):
    """What a worker has done since its last report."""

    job: int
    progress: Progress | None
    """None: the job is done."""
    encoder: str
    """The library that encodes, and why it is not the fast one."""


def run_jobs(
    jobs: Mapping[int, Job],
    config: PreprocessConfig,
    recipe: Recipe,
    *,
    num_workers: int,
    check: Callable[[], None],
) -> Generator[Report, None, None]:
    """Run the jobs by number on so many processes (1: in this one) and yield what they report.

    Raises what a worker raised, ValueError or OSError, and RuntimeError with its traceback for a
    defect; and what `check` raises, which is called often. Closing the iterator ends the workers;
    shards that are not whole are removed.
    """
    num_threads = max(1, num_cores() // num_workers)
    if num_workers == 1:
        run: Generator[Report | None, None, None]
        run = _run_all(JobRunner(config, recipe, num_threads=num_threads), jobs)
    else:
        run = _run_in_workers(jobs, num_workers, partial(_start, config, recipe, num_threads))
    with closing(run) as reports:
        for report in reports:
            check()
            if report is not None:
                yield report


def _run_all(runner: JobRunner, jobs: Mapping[int, Job]) -> Generator[Report, None, None]:
    for number, job in jobs.items():
        with closing(runner.run(number, job)) as reports:
            for progress in reports:
                yield Report(number, progress, runner.encoder)
        yield Report(number, None, runner.encoder)


def _run_in_workers(
    jobs: Mapping[int, Job],
    num_workers: int,
    start: Callable[[], tuple[Connection, SpawnProcess]],
) -> Generator[Report | None, None, None]:
    """What the workers report, and now and then None while they have nothing to report."""
    pending = iter(jobs.items())
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(num_workers):
            channel, process = start()
            workers[channel] = process
            _give_next_job(channel, pending)
        while workers:
            yield None
            for ready in wait(list(workers), _POLL_SECONDS):
                assert isinstance(ready, Connection)
                yield from _listen(ready, workers, pending)
    finally:
        _end(workers)


def _listen(
    channel: Connection, workers: dict[Connection, SpawnProcess], pending: Iterator[_Task]
) -> Iterator[Report]:
    """The report that has come; a worker whose job is done gets the next one, or goes home."""
    report = _receive(channel, workers[channel])
    if report is None:
        workers.pop(channel).join()
        return
    yield report
    if report.progress is None:
        _give_next_job(channel, pending)


def _give_next_job(channel: Connection, pending: Iterator[_Task]) -> None:
    with suppress(OSError):  # it has died, as its silence will say
        channel.send(next(pending, None))


def _start(
    config: PreprocessConfig, recipe: Recipe, num_threads: int
) -> tuple[Connection, SpawnProcess]:
    """A worker, and the channel through which jobs go and reports come."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, config, recipe, num_threads)
    process = context.Process(target=_work, args=arguments, name="preprocess", daemon=True)
    # Starting it is part of the first start, and would unblock the signals again.
    resource_tracker.ensure_running()
    with _stop_signals_blocked():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """A process started here never sees them: they reach all of a group, and we end our workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(channel: Connection, process: SpawnProcess) -> Report | None:
    """The next report; None when the worker has done all that it was given."""
    try:
        message = channel.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        why = f"exit status {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            why = "killed, perhaps for want of memory: try fewer workers"
        raise ChildProcessError(
            f"a worker process ended early ({why}); the same command goes on from here"
        ) from None
    if isinstance(message, BaseException):
        raise message
    assert message is None or isinstance(message, Report)
    return message


def _end(workers: Mapping[Connection, SpawnProcess]) -> None:
    """Hang up, so that they end, and see to it that they do."""
    for channel in workers:
        channel.close()
    for process in workers.values():
        process.join(_GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _work(channel: Connection, config: PreprocessConfig, recipe: Recipe, num_threads: int) -> None:
    """A worker: runs the jobs that come through the channel until None comes."""
    end_with_parent()  # what it leaves is overwritten next time
    # Read by the tokenizer libraries when they start their threads.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    try:
        _serve(channel, JobRunner(config, recipe, num_threads=num_threads))
    except Exception as error:
        _is_sent(channel, error if is_users(error) else RuntimeError(traceback.format_exc()))


def _serve(channel: Connection, runner: JobRunner) -> None:
    """Work until there is no job, or nobody listens."""
    while (task := _receive_task(channel)) is not None:
        with closing(_run_all(runner, dict([task]))) as reports:
            if not all(_is_sent(channel, report) for report in reports):
                return
    _is_sent(channel, None)


def _receive_task(channel: Connection) -> _Task | None:
    """The next job; None where there is none, or the parent has hung up."""
    try:
        task: _Task | None = channel.recv()
    except (EOFError, OSError):
        return None
    return task


def _is_sent(channel: Connection, message: Report | Exception | None) -> bool:
    """Whether the parent still listens."""
    try:
        channel.send(message)
    except OSError:
        return False
    return True
