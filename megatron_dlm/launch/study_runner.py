"""`study run`: the runs of a study on this machine, as many side by side as there are cores."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_dlm.checkpoint.run_lock import Owner
from megatron_dlm.config.study_commands import StudyRunConfig
from megatron_dlm.runtime.processes import num_cores
from megatron_dlm.scaling.contradictions import contradictions_of
from megatron_dlm.scaling.run_state import owner_of
from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.scaling.study_plan import costs_of
from megatron_dlm.scaling.study_results import make_folder, run_folder
from megatron_dlm.training.status import read_status, write_status

_POLL_SECONDS = 0.1
_MOST_CONTRADICTIONS = 4


def run_study(config: StudyRunConfig) -> None:
    """Train what is not finished; a stop signal saves all runs and ends.

    A run that another process trains is waited for. Raises ValueError at the end if runs failed;
    they are named, the others are finished. However it ends, no run of its own goes on.
    """
    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    chosen = _chosen(study, config.only)
    costs = costs_of(study.configs(folder / "runs"), peak_flops=1.0)
    waiting = [run for run in chosen if not _is_finished(folder, run)]
    print(f"{study.name}: {len(chosen)} runs, {len(chosen) - len(waiting)} of them finished")
    finished = [run for run in chosen if run not in waiting]
    _refuse_other_settings(contradictions_of(study, finished, folder / "runs"), folder)
    make_folder(folder)
    # The longest first: what is left for the end is short, and no core waits long for the last.
    flops = {cost.name: cost.training_flops or 0.0 for cost in costs}
    queue = _Queue(folder, study, sorted(waiting, key=lambda run: -flops[run.name]))
    workers = config.workers or num_cores()
    with _stop_signals() as received, _children() as children:
        while not received and (queue.waiting or children):
            while run := queue.next(workers - len(children)):
                children.append(_start(folder, run))
            time.sleep(_POLL_SECONDS)
            _take_ended(children, queue)
    if received:
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print("stopped; the same command goes on from here", flush=True)
        raise SystemExit(128 + received[0])
    queue.refuse_failures(len(chosen))


class _Queue:
    """Runs that are still to be trained: each after those whose checkpoints it needs."""

    def __init__(self, folder: Path, study: Study, waiting: list[StudyRun]) -> None:
        self.waiting = waiting
        self._folder = folder
        self._failed: list[str] = []
        self._busy: set[str] = set()
        """Runs that other processes were seen to train."""
        self._finished = {run.name for run in study.runs if _is_finished(folder, run)}
        self._give_up({run.name for run in study.runs} - {run.name for run in waiting})

    def next(self, num_free: int) -> StudyRun | None:
        """The first one that may start now, if one of so many cores is left for it."""
        if num_free <= 0 and not self._busy:
            return None
        ready = [run for run in self.waiting if self._finished.issuperset(run.after)]
        # What other processes train comes first: on this machine it takes cores as well.
        for run in sorted(ready, key=lambda run: run.name not in self._busy):
            if owner := self._owner_of(run):
                num_free -= owner.host == socket.gethostname()
                continue
            if _is_finished(self._folder, run):  # by the process that had it
                self.waiting.remove(run)
                self._end_well(run)
            elif num_free > 0:
                self.waiting.remove(run)
                return run
            else:
                return None
        return None

    def ended(self, child: _Child) -> None:
        """A run has ended; what needs one that failed will not start."""
        run, returncode = child.run, child.process.returncode
        if returncode == 0 and _is_finished(self._folder, run):
            self._end_well(run)
        elif self._owner_of(run):  # another process was faster
            self.waiting.append(run)
        else:
            reason = _note_failure(run_folder(self._folder, run), child.process)
            print(f"failed with status {returncode}: {run.name}: {reason}", flush=True)
            self._failed.append(run.name)
            self._give_up({run.name})

    def refuse_failures(self, num_runs: int) -> None:
        """Raise ValueError if runs failed or could not start."""
        if self._failed:
            raise ValueError(
                f"{len(self._failed)} of {num_runs} runs failed: {', '.join(self._failed)}; their "
                f"train.log and output.log under {self._folder / 'runs'} say why; the same command "
                "tries them again"
            )

    def _owner_of(self, run: StudyRun) -> Owner | None:
        """The other process that trains it, which is said once."""
        owner = owner_of(run_folder(self._folder, run))
        if owner is not None and run.name not in self._busy:
            self._busy.add(run.name)
            print(f"waiting for {run.name}, which is trained by {owner}", flush=True)
        return owner

    def _end_well(self, run: StudyRun) -> None:
        print(f"finished: {run.name}", flush=True)
        self._finished.add(run.name)

    def _give_up(self, not_coming: set[str]) -> None:
        """Take out what waits for runs that will not be finished, and what waits for that."""
        missing = not_coming - self._finished
        while lost := [run for run in self.waiting if missing.intersection(run.after)]:
            for run in lost:
                needed = ", ".join(sorted(missing.intersection(run.after)))
                print(f"not started: {run.name} needs {needed}", flush=True)
                self.waiting.remove(run)
                self._failed.append(run.name)
                missing.add(run.name)


def _chosen(study: Study, only: list[str]) -> list[StudyRun]:
    texts = [text.strip() for word in only for text in word.split(",") if text.strip()]
    chosen = [run for run in study.runs if not only or any(text in run.name for text in texts)]
    if not chosen:
        names = ", ".join(run.name for run in study.runs)
        raise ValueError(f"only {', '.join(texts)}: no run has that in its name (have: {names})")
    return chosen


def _refuse_other_settings(contradictions: list[str], folder: Path) -> None:
    """What is finished would count as a run of the study, and is another."""
    if contradictions:
        more = len(contradictions) - _MOST_CONTRADICTIONS
        shown = contradictions[:_MOST_CONTRADICTIONS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"finished runs are not those of the study: {'; '.join(shown)}; give another "
            f"output_dir, or remove the folders of these runs under {folder / 'runs'}"
        )


def _is_finished(folder: Path, run: StudyRun) -> bool:
    status = read_status(run_folder(folder, run))
    return status is not None and status.state == "finished"


def _note_failure(directory: Path, process: subprocess.Popen[bytes]) -> str:
    """Why a run failed; said in status.json too where the run could not do it."""
    log = directory / "output.log"
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    status = read_status(directory)
    if status is None or (status.state, status.pid) != ("failed", process.pid):
        reason = f"status {process.returncode}: {last} ({log})"
        with contextlib.suppress(OSError):  # a full disk is what it may have failed of
            write_status(directory, "failed", status.step if status else 0, reason)
    return last


@dataclass
class _Child:
    run: StudyRun
    process: subprocess.Popen[bytes]


def _start(folder: Path, run: StudyRun) -> _Child:
    directory = run_folder(folder, run)
    directory.mkdir(parents=True, exist_ok=True)
    print(f"begins: {run.name}", flush=True)
    with (directory / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_dlm", "train"),
                *(*run.flags_in(folder / "runs"), "--train.output_dir", str(directory)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            # One core each: threads of several runs would only fight over the cores.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return _Child(run, process)


@contextlib.contextmanager
def _children() -> Iterator[list[_Child]]:
    """A list of runs that train; those that still do at the end save and end before it returns."""
    children: list[_Child] = []
    try:
        yield children
    finally:
        for child in children:
            child.process.terminate()  # it saves and ends
        for child in children:
            child.process.wait()


def _take_ended(children: list[_Child], queue: _Queue) -> None:
    for child in [child for child in children if child.process.poll() is not None]:
        children.remove(child)
        queue.ended(child)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The stop signals that were received, in a list that fills; at the end they are given back."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the terminal may go
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
