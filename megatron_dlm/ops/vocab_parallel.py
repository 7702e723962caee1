"""Functions of the softmax over a vocabulary that is split over tensor-parallel ranks.

Logits are never gathered: ranks exchange a few numbers per row. Rows are worked off in chunks that
stay in the cache, so the only tensor of the logits' size made here is their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

_LOWEST = torch.finfo(torch.float32).min
_CPU_CHUNK_ELEMENTS = 1 << 17
_GPU_CHUNK_ELEMENTS = 1 << 26


def log_prob(
    logits: Tensor, targets: Tensor, *, vocab_size: int, tp_group: ProcessGroup | None
) -> Tensor:
    """log softmax(logits)[target] in nats, fp32 [n]: the negative cross entropy.

    logits [n, V/tp], any float dtype: this rank's columns of the padded vocabulary; targets int64
    [n]: global ids, the same on every rank. Columns of ids >= vocab_size are padding: they take no
    part in the softmax and get gradient 0. A target outside [0, vocab_size) yields -inf.
    Collectives over tp_group, in the forward pass only: all-reduce MAX [n], all-reduce SUM [2, n];
    also when n is 0.
    """
    check_rows(logits, targets)
    result = _LogProb.apply(logits, targets, vocab_size, tp_group)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _Context(Protocol):
    """What `_LogProb` keeps from its forward to its backward pass."""

    num_columns: int
    is_split: bool

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _LogProb(torch.autograd.Function):
    """Saves the logits themselves and two numbers per row; recomputes this rank's softmax."""

    @staticmethod
    def forward(
        ctx: _Context,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        tp_group: ProcessGroup | None,
    ) -> Tensor:
        shard = VocabShard.of(logits, vocab_size, tp_group)
        columns, here = shard.columns(targets)
        maximum, exp_sum = _max_and_exp_sum(logits[:, : shard.num_columns])
        selected = select(logits, columns)
        log_probs, share = shard.log_probs(maximum, exp_sum, selected[None], here[None])
        ctx.save_for_backward(logits, torch.where(here, columns, -1), share)
        ctx.num_columns, ctx.is_split = shard.num_columns, shard.is_split
        outside = (targets < 0) | (targets >= vocab_size)
        return log_probs[0].masked_fill_(outside, -torch.inf)

    @staticmethod
    def backward(ctx: _Context, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, share = ctx.saved_tensors
        num_columns = ctx.num_columns
        grad_logits = torch.empty_like(logits)
        grad_logits[:, num_columns:] = 0.0
        scale = (-grad_output * share)[:, None]
        no_share = (share == 0)[:, None]
        at_target = torch.where(columns >= 0, grad_output, 0.0)[:, None]
        columns = columns.clamp(min=0)[:, None]
        buffer = chunk_buffer(logits[:, :num_columns])
        for rows in row_chunks(logits[:, :num_columns]):
            target = grad_logits[rows, :num_columns]
            # An fp32 gradient is built in its own memory, others in an fp32 chunk: g * (1 - p)
            # loses all its digits when it is rounded to bf16 before the subtraction.
            in_place = target.dtype == torch.float32 and target.is_contiguous()
            chunk = softmax_of_chunk(logits[rows, :num_columns], target if in_place else buffer)
            chunk.mul_(scale[rows])
            if ctx.is_split:
                chunk.masked_fill_(no_share[rows], 0.0)  # the softmax of a row of -inf is NaN
            chunk.scatter_add_(1, columns[rows], at_target[rows])
            if not in_place:
                target.copy_(chunk)
        return grad_logits, None, None, None


@dataclass(frozen=True)
class VocabShard:
    """The columns of the padded vocabulary that this rank holds."""

    tp_group: ProcessGroup | None
    first_id: int
    num_columns: int
    """Columns of real ids; the columns behind them are padding."""
    is_split: bool
    """More than one rank holds columns."""

    @classmethod
    def of(cls, logits: Tensor, vocab_size: int, tp_group: ProcessGroup | None) -> VocabShard:
        """The shard of this rank's logits [n, V/tp]."""
        rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        width = logits.shape[1]
        num_columns = min(max(vocab_size - rank * width, 0), width)
        return cls(tp_group, rank * width, num_columns, size > 1)

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of every id, 0 where another rank holds it, and whether this one does."""
        columns = ids - self.first_id
        here = (columns >= 0) & (columns < self.num_columns)
        return torch.where(here, columns, 0), here

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.is_split:
            all_reduce(values, op=ReduceOp.SUM, group=self.tp_group)
        return values

    def log_probs(
        self, maximum: Tensor, exp_sum: Tensor, selected: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From what each rank knows of its own columns to the softmax over all ranks.

        maximum, exp_sum: fp32 [n] of `_max_and_exp_sum`; selected: fp32 [k, n], logits of k ids per
        row where `here` [k, n] says that this rank holds them. Returns log p of these ids, fp32
        [k, n] (meaningless where no rank holds the id), and this rank's share of the mass, fp32
        [n]: the softmax over all ranks is that of this rank's columns times the share.
        Collectives: all-reduce MAX [n], all-reduce SUM [1 + k, n].
        """
        local_exp_sum = exp_sum
        if self.is_split:
            local_maximum, maximum = maximum, maximum.clone()
            all_reduce(maximum, op=ReduceOp.MAX, group=self.tp_group)
            local_exp_sum = exp_sum * torch.exp(local_maximum - maximum)
        shifted = (selected - maximum).masked_fill_(~here, 0.0)
        packed = self.sum_(torch.cat((local_exp_sum[None], shifted)))
        return packed[1:] - packed[0].log(), local_exp_sum / packed[0]


def _max_and_exp_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of [n, columns]: maximum m and sum exp(logits - m), fp32.

    (lowest, 0) where there are no columns or all hold -inf.
    """
    maximum, peaks = no_mass(logits)
    buffer = chunk_buffer(logits)
    for rows in row_chunks(logits):
        maximum[rows] = logits[rows].amax(dim=1)
        torch.amax(softmax_of_chunk(logits[rows], buffer), dim=1, out=peaks[rows])
    return of_peaks(maximum, peaks)


def no_mass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and highest probability of rows without columns: -inf and 0, fp32 [n]."""
    maximum = torch.full(logits.shape[:1], -torch.inf, dtype=torch.float32, device=logits.device)
    return maximum, torch.zeros_like(maximum)


def of_peaks(maximum: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m and sum exp(logits - m) from m and the probability there, which is 1 / sum."""
    exp_sum = peaks.reciprocal().masked_fill_(maximum == -torch.inf, 0.0)
    return maximum.clamp(min=_LOWEST), exp_sum


def softmax_of_chunk(logits: Tensor, buffer: Tensor) -> Tensor:
    """Per row in fp32, in the memory of `buffer`; NaN if all are -inf.

    The fused kernel beats separate passes; one copy costs less than what it loses on strided rows.
    """
    out = buffer[: logits.shape[0]]
    rows = logits if logits.is_contiguous() else out.copy_(logits)
    return torch.softmax(rows, dim=1, dtype=torch.float32, out=out)


def select(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[i, columns[i]] in fp32, [n]; 0 where the rank holds no columns."""
    if logits.shape[1] == 0:
        return torch.zeros(logits.shape[:1], dtype=torch.float32, device=logits.device)
    return logits.gather(1, columns[:, None]).squeeze(1).to(torch.float32, copy=True)


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, each small enough for the cache; none if the tensor is empty."""
    if logits.numel() == 0:
        return
    num_rows = _rows_per_chunk(logits)
    for start in range(0, logits.shape[0], num_rows):
        yield slice(start, start + num_rows)


def chunk_buffer(logits: Tensor) -> Tensor:
    """Uninitialised fp32 memory for the largest of `row_chunks`, to be used again by each."""
    num_rows = min(_rows_per_chunk(logits), logits.shape[0])
    return torch.empty(num_rows, logits.shape[1], dtype=torch.float32, device=logits.device)


def _rows_per_chunk(logits: Tensor) -> int:
    budget = _GPU_CHUNK_ELEMENTS if logits.is_cuda else _CPU_CHUNK_ELEMENTS
    return max(1, budget // max(1, logits.shape[1]))


def check_rows(logits: Tensor, *of_rows: Tensor) -> None:
    """Assert logits [n, V/tp] and [n] for everything given per row."""
    assert logits.dim() == 2, f"logits must be [n, V/tp], got {tuple(logits.shape)}"
    for values in of_rows:
        assert values.shape == logits.shape[:1], (
            f"{tuple(values.shape)} values, {logits.shape[0]} rows of logits"
        )
