"""Stop requests: handlers, and the agreement of several ranks on one step."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_dlm.training import signals
from megatron_dlm.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_reported_by_name(number):
    with StopRequest() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert stop.poll() == number.name
        assert stop.poll() == number.name


def test_former_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    stop = StopRequest()
    stop.install()
    stop.install()  # must not take our own handler for the former one
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    stop.close()
    stop.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_later_second_interrupt_raises(monkeypatch):
    monkeypatch.setattr(signals, "_SAME_INTERRUPT_SECONDS", 0.0)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_torchrun_passes_on_is_the_same_interrupt():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll() == "SIGINT"


def _run_until_stopped() -> tuple[int, str | None]:
    rank = dist.get_rank()
    with StopRequest(dist.group.WORLD) as stop:
        for step in range(1, 100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002 * rank)  # ranks are never quite together
            reason = stop.poll()
            if reason is not None:
                return step, reason
    return 100, None


def test_all_ranks_stop_after_the_same_step(ranks):
    # Sent by one rank during step 5, voted on at its end, known to all at the end of step 6.
    assert ranks.run(_run_until_stopped, num_ranks=2) == [(6, "SIGTERM")] * 2
