"""Stop signals: handlers, the guard of the start, and the agreement of several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megatron_dlm.training import signals
from megatron_dlm.training.signals import STOP_SIGNALS, StopSignals
from megatron_dlm.training.stop_vote import StopVote


@pytest.fixture(autouse=True)
def restored_handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_reported_by_name(number):
    with StopSignals() as received:
        vote = StopVote(received, None)
        assert vote.poll() is vote.now() is None
        os.kill(os.getpid(), number)
        assert vote.poll() == vote.now() == number.name
        assert vote.poll() == number.name


def test_former_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_repeated_after_the_stop_is_ignored():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_later_second_interrupt_raises(monkeypatch):
    monkeypatch.setattr(signals, "_SAME_INTERRUPT_SECONDS", 0.0)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_torchrun_passes_on_is_the_same_interrupt():
    with StopSignals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert StopVote(received, None).poll() == "SIGINT"


# The main thread sits in a library that runs no Python handler, as in a rendezvous.
_WAITS_IN_A_LIBRARY = """
import ctypes, os, signal, sys, threading, time
from megatron_dlm.training import signals
signals.START_SECONDS = 0.3
with signals.StopSignals() as stop:
    stop.guard_start()
    if sys.argv[1] == "started":
        stop.started()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    seconds = 1.5 if sys.argv[1] == "started" else 100
    until = time.monotonic() + seconds
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sem_init(lock, 0, 0)
    moment = (ctypes.c_long * 2)(int(time.time() + seconds), 0)
    while ctypes.CDLL(None).sem_timedwait(lock, moment) and time.monotonic() < until:
        pass
print("came to its end", stop.received)
"""


@pytest.mark.parametrize("phase", ["starting", "started"])
def test_signalled_rank_whose_partners_do_not_come_ends_well(phase):
    command = [sys.executable, "-c", _WAITS_IN_A_LIBRARY, phase]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    if phase == "starting":
        expected = "SIGTERM: stopped before the other ranks appeared; nothing had been done\n"
        assert (ended.stdout, ended.stderr) == ("", expected)
    else:
        assert (ended.stdout, ended.stderr) == ("came to its end 2\n", "")


def _run_until_stopped() -> tuple[int, str | None]:
    rank = dist.get_rank()
    with StopSignals() as received:
        vote = StopVote(received, dist.group.WORLD)
        for step in range(1, 100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002 * rank)  # ranks are never quite together
            reason = vote.poll()
            if reason is not None:
                return step, reason
    return 100, None


def _asked_at_once() -> list[str | None]:
    with StopSignals() as received:
        vote = StopVote(received, dist.group.WORLD)
        first = vote.now()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [first, vote.now()]


def test_all_ranks_stop_after_the_same_step(ranks):
    # Sent by one rank during step 5, voted on at its end, known to all at the end of step 6.
    assert ranks.run(_run_until_stopped, num_ranks=2) == [(6, "SIGTERM")] * 2
    assert ranks.run(_asked_at_once, num_ranks=2) == [[None, "SIGUSR1"]] * 2
