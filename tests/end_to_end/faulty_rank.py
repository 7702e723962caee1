"""Runs `megatron_dlm` with a fault in one step: `python faulty_rank.py raise|sleep STEP ... -m
megatron_dlm ARGUMENTS`. A wrapper of `start_ranks`."""

from __future__ import annotations

import sys
import time

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


if __name__ == "__main__":
    schedule.learning_rate = learning_rate
    sys.exit(main(sys.argv[sys.argv.index("megatron_dlm") + 1 :]))
