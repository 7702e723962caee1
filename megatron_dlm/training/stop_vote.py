"""One rank's stop signal becomes a stop that all ranks take after the same step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dlm.training.signals import StopSignals, signal_name


class StopVote:
    """Asks all ranks whether one of them received a stop signal; all get the same answer."""

    def __init__(self, signals: StopSignals, control_group: dist.ProcessGroup | None) -> None:
        """`control_group`: gloo, all ranks; None for a single process."""
        self._signals = signals
        is_alone = control_group is None or dist.get_world_size(control_group) == 1
        self._group = None if is_alone else control_group
        self._vote: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def now(self) -> str | None:
        """Name of the signal that any rank received ("SIGTERM"), or None; waits for all ranks."""
        if self._group is None:
            return signal_name(self._signals.received)
        vote, work = self._ask()
        work.wait()
        return signal_name(int(vote))

    def poll(self) -> str | None:
        """The same without waiting. Call once per step.

        One asynchronous all-reduce(MAX) of an int per call, read at the next call: ranks never wait
        for it, all get the same answer, and the answer is one step old.
        """
        if self._group is None:
            return signal_name(self._signals.received)
        agreed = 0
        if self._work is not None and self._vote is not None:
            self._work.wait()
            agreed = int(self._vote)
        self._vote, self._work = self._ask()
        return signal_name(agreed)

    def _ask(self) -> tuple[torch.Tensor, dist.Work]:
        vote = torch.tensor(self._signals.received, dtype=torch.int64)
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return vote, work
