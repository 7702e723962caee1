"""Runs another command of ours as a child process, shown first, so that the user learns it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_command(
    arguments: Sequence[str], *, num_ranks: int = 1, environment: Mapping[str, str] | None = None
) -> None:
    """Run `megatron-dlm arguments`, under torchrun if there are several ranks, and show it.

    `environment` is added to ours. The child writes to our terminal, so its live progress is seen.
    A stop signal lets it save and end, a second one kills it; then SystemExit is raised. Raises
    ValueError if it fails; what went wrong it has said itself.
    """
    environment = environment or {}
    launcher = ["-m"]
    shown = ["megatron-dlm"]
    if num_ranks > 1:
        torchrun = ["--standalone", "--nproc-per-node", str(num_ranks), "-m"]
        launcher = ["-m", "torch.distributed.run", *torchrun]
        shown = ["torchrun", *torchrun, "megatron_dlm"]
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    print("\n$", *settings, shlex.join([*shown, *arguments]), flush=True)
    program = [sys.executable, *launcher, "megatron_dlm", *arguments]
    status, stopped_by = _run_to_the_end(program, environment, has_launcher=num_ranks > 1)
    if stopped_by is not None:
        print("stopped; the same command goes on from here", flush=True)
        raise SystemExit(128 + stopped_by)
    if status != 0:
        raise ValueError(
            f"`{shown[0]} ... {arguments[0]}` ended with status {status}, its message is above; "
            "after mending it, the same command goes on from here"
        )


def _run_to_the_end(
    program: Sequence[str], environment: Mapping[str, str], *, has_launcher: bool
) -> tuple[int, int | None]:
    """Exit status, and the first signal that asked this process to stop while the child ran."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _ask_to_stop(child, has_launcher=has_launcher)
        else:
            os.killpg(child.pid, signal.SIGKILL)

    child = subprocess.Popen(
        program,
        # One thread per rank: several ranks with several threads each only fight over the cores.
        env={"OMP_NUM_THREADS": "1", **os.environ, **environment},
        # Ctrl-C reaches us alone. torchrun would answer it with a traceback and a deadline.
        start_new_session=True,
    )
    previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status, received[0] if received else None


def _ask_to_stop(child: subprocess.Popen[bytes], *, has_launcher: bool) -> None:
    """SIGTERM to the ranks, which save and end; their launcher then ends by itself."""
    try:
        process = psutil.Process(child.pid)
        ranks = process.children() if has_launcher else []
        for target in ranks or [process]:
            target.terminate()
    except psutil.NoSuchProcess:
        pass  # it has ended by itself
