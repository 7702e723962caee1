"""Processes that start in milliseconds: forks of one that has imported Megatron already.

Importing it takes seconds, and the suite starts hundreds of processes that need it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest


@cache
def fork_server() -> ForkServerContext:
    """The `Process` of this context is a child of a server that ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_imports"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it imports what this process can
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class ForkedCommand:
    """A Python program in a fork; what tests use of subprocess.Popen."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: dict[str, str],
        *,
        script: Path | None = None,
    ) -> None:
        """`python -m megatron_dlm arguments`, or a script, in the directory of `log`.

        Its output goes to `log` with the suffixes .out and .err.
        """
        self._process = fork_server().Process(
            target=_run, args=(script, list(arguments), log, environment), daemon=False
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        atexit.register(self.kill)  # what a failed test leaves, multiprocessing waits for

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("megatron_dlm", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As kill -9; nothing if it has ended."""
        self._process.kill()


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One of our tools to its end, as subprocess.run."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        words = list(map(str, arguments))
        code = ForkedCommand(words, log, dict(os.environ), script=script).wait()
        output, errors = (log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    return subprocess.CompletedProcess([str(script), *words], code, output, errors)


def _run(script: Path | None, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What a shell and a new interpreter would do."""
    os.setsid()
    os.chdir(log.parent)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    sys.argv = [str(script), *arguments]
    try:
        if script is None:
            runpy.run_module("megatron_dlm", run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
