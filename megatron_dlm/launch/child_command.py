"""Runs another command of ours as a child process, shown first, so that the user learns it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def run_command(arguments: Sequence[str], *, num_ranks: int = 1) -> None:
    """Run `megatron-dlm arguments`, under torchrun if there are several ranks, and show it.

    The child keeps the terminal, so its live progress is seen. A stop signal lets it save and end;
    then SystemExit is raised. Raises ValueError if it fails; what went wrong it has said itself.
    """
    launcher: list[str] = []
    shown = ["megatron-dlm"]
    if num_ranks > 1:
        torchrun = ["--standalone", "--nproc-per-node", str(num_ranks), "-m"]
        launcher = ["-m", "torch.distributed.run", *torchrun]
        shown = ["torchrun", *torchrun, "megatron_dlm"]
    print(f"\n$ {shlex.join([*shown, *arguments])}", flush=True)
    program = [sys.executable, *(launcher or ["-m"]), "megatron_dlm", *arguments]
    status, stopped_by = _run_to_the_end(program)
    if stopped_by is not None:
        print("stopped; the same command goes on from here", flush=True)
        raise SystemExit(128 + stopped_by)
    if status != 0:
        raise ValueError(
            f"`{shown[0]} ... {arguments[0]}` ended with status {status}, its message is above; "
            "after mending it, the same command goes on from here"
        )


def _run_to_the_end(program: Sequence[str]) -> tuple[int, int | None]:
    """Exit status, and the signal that asked this process to stop while the child ran."""
    received: list[int] = []
    # One thread per rank: several ranks with several threads each only fight over the cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            child.send_signal(number)

    child = subprocess.Popen(program, env=environment)
    previous = {number: signal.signal(number, remember) for number in _STOP_SIGNALS}
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status, received[0] if received else None


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
