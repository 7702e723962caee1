"""Names ranks that are slower than the others, by the time that they need for themselves.

A step takes as long as its slowest rank, so its duration says nothing about who that is. What a
rank does alone is waiting for its data and the forward passes; ranks that hold the same pipeline
stage do the same work and are compared. Ranks that talk inside a layer (tensor, context and expert
parallel) wait for each other there: a slow one makes its whole group look slow.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class Straggler:
    """A slow rank."""

    rank: int
    host: str
    seconds: float
    """Of its own per step."""
    median_seconds: float
    """Of the ranks of the same stage."""

    def __str__(self) -> str:
        times = self.seconds / self.median_seconds
        return (
            f"rank {self.rank} on {self.host} is slow: {self.seconds:.3g} s of its own per step, "
            f"{times:.1f} times the median of its stage"
        )


class Stragglers:
    """Measures between two reports. A context manager: it listens to the model inside the block."""

    def __init__(
        self, chunks: Sequence[nn.Module], parallel: ParallelContext, *, factor: float
    ) -> None:
        """factor: of the median, above which a rank is named; 0 measures nothing. Collective."""
        self._is_active = factor > 0 and parallel.world_size > 1
        self._factor = factor
        self._parallel = parallel
        self._hosts = [""] * parallel.world_size
        if self._is_active:
            dist.all_gather_object(self._hosts, socket.gethostname(), group=parallel.control_group)
        self._hooks: list[Any] = []
        for chunk in chunks if self._is_active else ():
            self._hooks.append(chunk.register_forward_pre_hook(self._begin))
            self._hooks.append(chunk.register_forward_hook(self._end))
        self._forward = Stopwatch(is_cuda=next(chunks[0].parameters()).is_cuda)
        self._named: set[int] = set()

    def report(self, num_steps: int, waited_seconds: float) -> list[Straggler]:
        """Ranks that are slow now and were not at the last report; then starts anew.

        waited_seconds: of this rank for its data. Collective.
        """
        if not self._is_active:
            return []
        own = (self._forward.take_seconds() + waited_seconds) / num_steps
        table = torch.zeros(self._parallel.world_size, 2, dtype=torch.float64)
        table[self._parallel.rank] = torch.tensor([own, self._parallel.pipeline.rank])
        dist.all_reduce(table, group=self._parallel.control_group)
        slow = slow_ranks(table[:, 0].tolist(), table[:, 1].int().tolist(), self._factor)
        news = [rank for rank in slow if rank not in self._named]
        self._named = set(slow)
        seconds = table[:, 0].tolist()
        return [Straggler(rank, self._hosts[rank], seconds[rank], slow[rank]) for rank in news]

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            self._forward.begin()

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._forward.end()

    def __enter__(self) -> Stragglers:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def slow_ranks(seconds: Sequence[float], stages: Sequence[int], factor: float) -> dict[int, float]:
    """rank -> median of its stage, for ranks above factor times it; of two the lower is median."""
    slow = {}
    for rank, stage in enumerate(stages):
        same = sorted(own for own, other in zip(seconds, stages, strict=True) if other == stage)
        median = same[(len(same) - 1) // 2]
        if seconds[rank] > factor * median:
            slow[rank] = median
    return slow
