"""Runs `megatron-dlm` commands in forks of one process that has imported everything already.

A fork is a process of its own: it can crash, hang and be killed like any other. It only starts in
milliseconds where a new interpreter spends seconds on imports, which campaigns of thousands of
commands cannot afford.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megatron_dlm.cli import COMMANDS, main
from megatron_dlm.runtime.device import open_device

_POLL_SECONDS = 0.005
_CRASHED = 70


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int | None
    """Exit status; minus the signal that ended it; None if it ran out of time."""
    output: str
    errors: str
    seconds: float


def warm_up(commands: Sequence[str]) -> None:
    """Import what the commands need, once; forks share it."""
    open_device("cpu")
    for name in commands:
        _, config, function = COMMANDS[name]
        for location in (config, function):
            import_module(location.partition(":")[0])
    if "train" in commands:
        import_module("megatron_dlm.training.train")


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    memory_bytes: int | None = None,
) -> int:
    """Start `megatron-dlm arguments` in a fork, its output going to `log`; the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = _CRASHED
        try:
            status = _run(arguments, log, environment or {}, memory_bytes)
        finally:
            os._exit(status)  # nothing of the parent's is flushed or closed twice
    return child


def _run(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], memory_bytes: int | None
) -> int:
    os.setsid()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    for stream, path in ((1, log), (2, log.with_suffix(".err"))):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream)
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def finish(child: int, log: Path, *, timeout_seconds: float, started: float) -> Outcome:
    """Wait for a started command; it is killed when its time is over."""
    deadline = started + timeout_seconds
    status: int | None = None
    while True:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(_POLL_SECONDS)
    errors = log.with_suffix(".err")
    return Outcome(status, _text(log), _text(errors), time.monotonic() - started)


def run(
    arguments: Sequence[str], log: Path, *, timeout_seconds: float, memory_bytes: int | None = None
) -> Outcome:
    """Run one command to its end."""
    started = time.monotonic()
    child = start(arguments, log, memory_bytes=memory_bytes)
    return finish(child, log, timeout_seconds=timeout_seconds, started=started)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
