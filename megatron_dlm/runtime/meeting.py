"""Where the ranks of a job find each other: a store of keys that all reach, before any collective.

Rank 0 keeps it at MASTER_ADDR:MASTER_PORT (under torchrun its agent does).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_CONNECT_SECONDS, _POLL_SECONDS = 5.0, 0.2


@dataclass(frozen=True)
class Meeting:
    """The store, and who this rank is."""

    store: dist.Store
    rank: int
    world_size: int
    timeout: timedelta

    @property
    def is_main(self) -> bool:
        """Rank 0 of the job."""
        return self.rank == 0

    def from_main(self, name: str, value: Any) -> Any:
        """What rank 0 gives under this name (JSON), on every rank. Raises ValueError."""
        ours = _own_keys(self.store)
        with _in_one_line():
            if self.is_main:
                ours.set(name, json.dumps(value))
            return json.loads(ours.get(name))

    def wait_for_all(self) -> None:
        """Return when every rank has come here. Raises ValueError when one does not in time."""
        ours = _own_keys(self.store)
        with _in_one_line():
            if ours.add("here", 1) == self.world_size:
                ours.set("all_here", "")
            ours.wait(["all_here"], self.timeout)


def meet(timeout_minutes: float) -> Meeting:
    """Reach the store, by torchrun's variables or Slurm's; alone where there are neither.

    Raises ValueError when it is not there in time.
    """
    timeout = timedelta(minutes=timeout_minutes)
    with _in_one_line():
        store, rank, world_size = _open_store(timeout)
    store.set_timeout(timeout)
    return Meeting(store, rank, world_size, timeout)


def _open_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    environment = os.environ
    if "RANK" in environment:
        if environment["RANK"] != "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _wait_for_store(timeout)
        return next(dist.rendezvous("env://", timeout=timeout))
    num_tasks = int(environment.get("SLURM_NTASKS", "1"))
    if num_tasks == 1:
        return dist.HashStore(), 0, 1
    missing = [
        name for name in ("SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT") if name not in environment
    ]
    if missing:
        raise ValueError(
            f"SLURM_NTASKS is {num_tasks} but {', '.join(missing)} is not set; start every task "
            "with srun and export MASTER_ADDR (the first node) and MASTER_PORT before it"
        )
    address = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    rank = int(environment["SLURM_PROCID"])
    if rank:
        _wait_for_store(timeout)
    return next(dist.rendezvous(address, rank, num_tasks, timeout=timeout))


def _wait_for_store(timeout: timedelta) -> None:
    """Until somebody listens at its address: PyTorch's own client may wait for twice the time."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdigit():
        return  # PyTorch says what is missing
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(_not_found(f"{address}:{port}: {error}")) from None
        time.sleep(_POLL_SECONDS)


def _own_keys(store: dist.Store) -> dist.Store:
    """The store under a name of this start: torchrun keeps one store over its restarts."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron_dlm_{start}", store)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(_not_found(reason)) from error


def _not_found(reason: str) -> str:
    return (
        f"the ranks did not find each other ({reason}); the logs of those that did not come "
        "say why; parallel.distributed_timeout_minutes is how long the others wait"
    )
