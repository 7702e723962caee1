"""`study run`: the runs of a study on this machine, as many side by side as there are cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_dlm.config.study_commands import StudyRunConfig
from megatron_dlm.runtime.processes import num_cores
from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.scaling.study_plan import costs_of
from megatron_dlm.scaling.study_results import run_folder
from megatron_dlm.training.status import read_status

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Child:
    run: StudyRun
    process: subprocess.Popen[bytes]


def run_study(config: StudyRunConfig) -> None:
    """Train what is not finished; a stop signal saves all runs and ends.

    Raises ValueError at the end if runs failed; they are named, the others are finished.
    """
    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    costs = costs_of(study.configs(folder / "runs"), peak_flops=1.0)
    chosen = [run for run in study.runs if not config.only or _named(run, config.only)]
    waiting = [run for run in chosen if not _is_finished(folder, run)]
    print(f"{study.name}: {len(chosen)} runs, {len(chosen) - len(waiting)} of them finished")
    # The longest first: what is left for the end is short, and no core waits long for the last.
    flops = {cost.name: cost.training_flops or 0.0 for cost in costs}
    queue = _Queue(folder, study, sorted(waiting, key=lambda run: -flops[run.name]))
    stop = _Stop()
    children: list[_Child] = []
    workers = config.workers or num_cores()
    while (queue.waiting and not stop.asked) or children:
        while len(children) < workers and not stop.asked and (run := queue.next()):
            children.append(_start(folder, run))
        if stop.asked:
            stop.pass_on([child.process for child in children])
        for child in [child for child in children if child.process.poll() is not None]:
            children.remove(child)
            if not stop.asked:
                queue.ended(child.run, well=_tell_end(folder, child))
        time.sleep(_POLL_SECONDS)
    stop.close()
    if stop.asked:
        print("stopped; the same command goes on from here")
        raise SystemExit(128 + stop.asked)
    queue.refuse_failures(len(chosen))


class _Queue:
    """Runs that are still to be trained: each after those whose checkpoints it needs."""

    def __init__(self, folder: Path, study: Study, waiting: list[StudyRun]) -> None:
        self.waiting = waiting
        self._folder = folder
        self._failed: list[str] = []
        self._finished = {run.name for run in study.runs if _is_finished(folder, run)}
        self._give_up({run.name for run in study.runs} - {run.name for run in waiting})

    def next(self) -> StudyRun | None:
        """The first one that may start now; None where there is none."""
        for run in self.waiting:
            if self._finished.issuperset(run.after):
                self.waiting.remove(run)
                return run
        return None

    def ended(self, run: StudyRun, *, well: bool) -> None:
        """What needs a run that failed will not start."""
        if well:
            self._finished.add(run.name)
            return
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


def _named(run: StudyRun, texts: list[str]) -> bool:
    return any(text in run.name for text in texts)


def _is_finished(folder: Path, run: StudyRun) -> bool:
    status = read_status(run_folder(folder, run))
    return status is not None and status.state == "finished"


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


def _tell_end(folder: Path, child: _Child) -> bool:
    """Whether the run is finished; says so either way."""
    if child.process.returncode == 0 and _is_finished(folder, child.run):
        print(f"finished: {child.run.name}", flush=True)
        return True
    log = run_folder(folder, child.run) / "output.log"
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    print(f"failed with status {child.process.returncode}: {child.run.name}: {last}", flush=True)
    return False


class _Stop:
    """The first stop signal; it is passed on once to every run."""

    def __init__(self) -> None:
        self.asked = 0
        self._told: set[int] = set()
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def pass_on(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Ask the runs that were not asked yet to save and end."""
        for process in processes:
            if process.pid not in self._told and process.poll() is None:
                self._told.add(process.pid)
                process.terminate()

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
