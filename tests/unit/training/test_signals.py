"""Stop requests: handlers, and the agreement of several ranks on one step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

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


def _run_until_stopped(rank: int, directory: str) -> None:
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with StopRequest(dist.group.WORLD) as stop:
        for step in range(1, 100):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002 * rank)  # ranks are never quite together
            reason = stop.poll()
            if reason is not None:
                break
    Path(directory, str(rank)).write_text(f"{step} {reason}")
    dist.destroy_process_group()


def test_all_ranks_stop_after_the_same_step(tmp_path):
    mp.spawn(_run_until_stopped, args=(str(tmp_path),), nprocs=2)
    # Sent by one rank during step 5, voted on at its end, known to all at the end of step 6.
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["6 SIGTERM"] * 2
