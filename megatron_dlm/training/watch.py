"""Watches over a run: a rank that dies, fails or hangs ends all of them, by name.

One thread per rank listens to the lifeline, one looks at the clock. Neither touches the step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from multiprocessing.context import ForkProcess

import torch.distributed as dist

from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.lifeline import Callbacks, Lifeline
from megatron_dlm.runtime.meeting import Meeting
from megatron_dlm.training.journal import Journal

STACKS_FOLDER = "stacks"
# Rank 0 asks all ranks for their stacks and judges; if it cannot, this rank ends by itself.
_JUDGEMENT_SECONDS = 15.0
_LONGEST_REASON = 500
# Errors that PyTorch raises when another rank is gone.
_COMMUNICATION = ("gloo", "nccl", "processgroup", "connection closed by peer")


@contextlib.contextmanager
def watched(meeting: Meeting, hang_timeout_minutes: float) -> Iterator[Watch]:
    """Inside, this rank ends with the others, and they with it; all of them are there.

    What the body raises is told to the other ranks, except an AgreedError, which they raise too.
    Raises ValueError when a rank does not come.
    """
    watch = Watch(meeting)
    with watch.lifeline:
        meeting.wait_for_all()
        ended = threading.Event()
        clock = (watch, hang_timeout_minutes * 60, ended)
        if hang_timeout_minutes > 0:
            threading.Thread(target=_look_at_clock, args=clock, name="hang", daemon=True).start()
        try:
            with watch.telling():
                yield watch
        finally:
            ended.set()


class Watch:
    """What this rank tells the others, and what it does when they tell it to end."""

    def __init__(self, meeting: Meeting) -> None:
        self._rank = meeting.rank
        self.journal = Journal()
        self._told: BaseException | None = None
        self._ending = threading.Lock()
        callbacks = Callbacks(
            state=lambda: self.journal.state, dump_stacks=self.dump_stacks, end=self.end
        )
        self.lifeline = Lifeline(meeting, callbacks)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What the body raises is told at once, before anything around it is closed."""
        try:
            yield
        except BaseException as error:
            if error is not self._told:
                self._told = error
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """Make an error of this rank known; of an error that another rank caused it may not
        return."""
        is_consequence = _is_consequence(error)
        reason = _in_one_line(error)
        if is_consequence or not isinstance(error, AgreedError):
            self.lifeline.report_failure(reason, is_consequence=is_consequence)
        self.journal.failed(reason, is_writer=self._rank == 0)
        _kill_writers()  # nobody will publish what they write, and one that hangs is waited for

    def dump_stacks(self) -> None:
        """Append the stacks of all threads to stacks/rank_N.txt in the run directory."""
        if self.journal.directory is None:
            return
        folder = self.journal.directory / STACKS_FOLDER
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8") as file:
                now = datetime.now().isoformat(timespec="seconds")
                file.write(f"--- {now} rank {self._rank} in {self.journal.state}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def end(self, verdict: str, is_writer: bool) -> None:
        """Say why and end this process, whatever its main thread waits for."""
        self._ending.acquire()  # never released: the first verdict is the last
        self.journal.failed(verdict, is_writer=is_writer)
        place = f" (rank {self._rank})" if self._rank else ""
        print(f"megatron-dlm train{place}: error: {verdict}", file=sys.stderr, flush=True)
        _kill_writers()
        time.sleep(0.2)  # what rank 0 has told the others is under way
        os._exit(1)


def _kill_writers() -> None:
    """Of asynchronous saves: the only processes that are forked here."""
    for child in multiprocessing.active_children():
        if isinstance(child, ForkProcess):
            child.kill()


def _look_at_clock(watch: Watch, step_seconds: float, ended: threading.Event) -> None:
    while not ended.wait(min(1.0, step_seconds / 10)):
        if watch.journal.is_overdue(step_seconds):
            reason = (
                f"{watch.journal.state} did not end in time (recovery.hang_timeout_minutes is "
                f"{step_seconds / 60:g}); the stacks of all ranks are in {STACKS_FOLDER}/"
            )
            watch.journal.event("hang", reason=reason)
            watch.lifeline.report_hang(reason)
            if not ended.wait(_JUDGEMENT_SECONDS):
                watch.dump_stacks()
                watch.end(f"{reason}; no answer from rank 0", True)
            return


def _is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; also one that it was turned into."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError):
            return True
        text = str(found).lower()
        if isinstance(found, RuntimeError) and any(word in text for word in _COMMUNICATION):
            return True
        found = found.__cause__ or found.__context__
    return False


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and text:
        return text[:_LONGEST_REASON]
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]
