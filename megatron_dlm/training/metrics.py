"""Sums and counts of the logged quantities, kept on the device until they are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Metrics:
    """Running (sum, count) of every metric; one collective per report, none in between.

    The totals are float64: sums of fp32 terms are then exact in practice, so that a report does not
    depend on how its terms were spread over ranks and micro-batches.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`names` must be the same, in the same order, on every rank of `group` (default: all)."""
        assert len(set(names)) == len(names), f"metric names repeat: {names}"
        self._rows = {name: row for row, name in enumerate(names)}
        self._totals = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        self._group = group

    @torch.no_grad()
    def add(self, terms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add `terms` (name -> (sum [], count [])) of this rank; never waits for the device.

        Every term counts, so ranks that hold copies of the same term must leave it to one of them.
        """
        for name, (total, count) in terms.items():
            row = self._totals[self._rows[name]]
            row[0] += total
            row[1] += count

    def reduce(self) -> dict[str, float]:
        """Mean of every metric over all that was added on any rank; then starts again from zero.

        One all-reduce; every rank of the group must call it. Metrics without a count are left out.
        """
        totals = self.pending()
        self._totals.zero_()
        return {name: total / count for name, (total, count) in totals.items() if count}

    def pending(self) -> dict[str, list[float]]:
        """name -> [sum, count] over all ranks since the last report, for a checkpoint.

        One all-reduce; every rank of the group must call it. Changes nothing.
        """
        totals = self._totals.clone()
        if dist.is_initialized():
            dist.all_reduce(totals, group=self._group)
        values = totals.tolist()
        return {name: values[row] for name, row in self._rows.items()}

    def restore(self, pending: Mapping[str, Sequence[float]], *, owner: bool) -> None:
        """Continue from `pending`; call on all ranks, with `owner` true on exactly one of them.

        Names that are no longer measured are dropped.
        """
        self._totals.zero_()
        for name, total_and_count in pending.items():
            if owner and name in self._rows:
                self._totals[self._rows[name]] = self._totals.new_tensor(list(total_and_count))
