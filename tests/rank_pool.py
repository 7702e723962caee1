"""Worker processes that run a function as the ranks of a fresh gloo process group.

The processes are started once and reused; every call gets its own group over a file store, so no
port is ever taken. The first failing rank's traceback is the failure of the call.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fork_server import fork_server

TIMEOUT_SECONDS = 180.0
_MANY_THREADS = 400


class RankPool:
    """`run(function, *arguments, num_ranks=n)` calls function(*arguments) on n ranks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._directory = tempfile.TemporaryDirectory()
        self._calls = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._directory.cleanup()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        num_ranks: int,
        timeout: float = TIMEOUT_SECONDS,
    ) -> list[Any]:
        """Results of all ranks, by rank."""
        self._start(num_ranks)
        self._calls += 1
        store = Path(self._directory.name) / f"store_{self._calls}"
        for rank in range(num_ranks):
            self._workers[rank][1].send((function, arguments, rank, num_ranks, str(store)))
        return self._collect(num_ranks, time.monotonic() + timeout)

    def _collect(self, num_ranks: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < num_ranks:
            for rank in range(num_ranks):
                process, connection = self._workers[rank]
                if rank in results or not connection.poll(0.005):
                    if rank not in results and not process.is_alive():
                        self._fail(f"rank {rank} died with exit code {process.exitcode}")
                    continue
                succeeded, value = connection.recv()
                if not succeeded:
                    self._fail(f"rank {rank} failed:\n{value}")
                results[rank] = value
            if time.monotonic() > deadline:
                missing = sorted(set(range(num_ranks)) - set(results))
                self._fail(f"ranks {missing} gave no answer in time")
        if any(_num_threads(process) > _MANY_THREADS for process, _ in self._workers):
            self._stop()  # groups of finished calls are still there; the next call starts anew
        return [results[rank] for rank in range(num_ranks)]

    def _fail(self, message: str) -> None:
        # Other ranks may wait in a collective for ever: the next call starts new processes.
        self._stop()
        raise AssertionError(message)

    def _start(self, num_ranks: int) -> None:
        assert num_ranks <= self._size, f"{num_ranks} ranks asked of a pool of {self._size}"
        context = fork_server()
        while len(self._workers) < num_ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            self._workers.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


def _serve(connection: Connection) -> None:
    """One worker: run what arrives until the pipe closes."""
    import torch.distributed as dist

    while True:
        try:
            function, arguments, rank, num_ranks, store = connection.recv()
        except (EOFError, OSError):
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks
            )
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        _let_go()
        connection.send(answer)


def _num_threads(process: multiprocessing.process.BaseProcess) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


def _let_go() -> None:
    """Collect the models of a finished call: the threads of their process groups would poll on."""
    for thing in gc.get_objects():
        # It keeps tensors of the last pass; their graph ends in hooks that hold the model, a cycle
        # through autograd that the collector cannot see.
        if type(thing).__name__.endswith("TokenDispatcher"):
            vars(thing).clear()
    gc.collect()
