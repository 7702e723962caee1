"""Runs `megatron_dlm` with a fault in one step: `python faulty_rank.py raise|sleep STEP ... -m
megatron_dlm ARGUMENTS`, or with one before the first (`die 0`). A wrapper of `start_ranks`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch.distributed as dist

from megatron_dlm.cli import main
from megatron_dlm.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_dlm.training import schedule

_learning_rate = schedule.learning_rate


def learning_rate(
    step: int, total_steps: int, optimizer: OptimizerConfig, settings: ScheduleConfig
) -> float:
    """What the loop calls in every step."""
    if step == int(sys.argv[2]):
        if sys.argv[1] == "sleep":
            time.sleep(1000)
        raise KeyError("the fault of the test")
    return _learning_rate(step, total_steps, optimizer, settings)


def die(*_: Any, **__: Any) -> None:
    """As a rank that is killed while all ranks begin to build their groups."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "die":
        dist.init_process_group = die
    schedule.learning_rate = learning_rate
    sys.exit(main(sys.argv[sys.argv.index("megatron_dlm") + 1 :]))
