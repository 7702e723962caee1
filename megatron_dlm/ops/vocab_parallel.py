"""Functions of the softmax over a vocabulary that is split over tensor-parallel ranks.

Logits are never gathered: ranks exchange a few numbers per row. Rows are worked off in chunks that
stay in the cache, so the only tensor of the logits' size made here is their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    assert logits.dim() == 2, f"logits must be [n, V/tp], got {tuple(logits.shape)}"
    assert targets.shape == logits.shape[:1], (
        f"{targets.shape[0]} targets, {logits.shape[0]} rows of logits"
    )
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
        rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        width = logits.shape[1]
        num_columns = min(max(vocab_size - rank * width, 0), width)
        local_targets = targets - rank * width
        here = (local_targets >= 0) & (local_targets < num_columns)
        columns = torch.where(here, local_targets, 0)

        maximum, local_exp_sum = _max_and_exp_sum(logits[:, :num_columns])
        if size > 1:
            local_maximum = maximum.clone()
            all_reduce(maximum, op=ReduceOp.MAX, group=tp_group)
            local_exp_sum.mul_(torch.exp(local_maximum - maximum))
        exp_sum = local_exp_sum
        target_logit = _select(logits, columns).sub_(maximum).masked_fill_(~here, 0.0)
        if size > 1:
            packed = torch.stack((local_exp_sum, target_logit))
            all_reduce(packed, op=ReduceOp.SUM, group=tp_group)
            exp_sum, target_logit = packed.unbind()

        # The softmax over all ranks is the softmax of this rank's columns times this rank's share.
        ctx.save_for_backward(logits, torch.where(here, columns, -1), local_exp_sum / exp_sum)
        ctx.num_columns, ctx.is_split = num_columns, size > 1
        outside = (targets < 0) | (targets >= vocab_size)
        return (target_logit - exp_sum.log()).masked_fill_(outside, -torch.inf)

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
        for rows in _row_chunks(logits[:, :num_columns]):
            target = grad_logits[rows, :num_columns]
            # An fp32 gradient is built in its own memory, others in an fp32 chunk: g * (1 - p)
            # loses all its digits when it is rounded to bf16 before the subtraction.
            out = target if target.dtype == torch.float32 else None
            chunk = _softmax(logits[rows, :num_columns], out).mul_(scale[rows])
            if ctx.is_split:
                chunk.masked_fill_(no_share[rows], 0.0)  # the softmax of a row of -inf is NaN
            chunk.scatter_add_(1, columns[rows], at_target[rows])
            if out is None:
                target.copy_(chunk)
        return grad_logits, None, None, None


def _max_and_exp_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of [n, columns]: maximum m and sum exp(logits - m), fp32.

    (lowest, 0) where there are no columns or all hold -inf.
    """
    maximum = torch.full(logits.shape[:1], _LOWEST, dtype=torch.float32, device=logits.device)
    exp_sum = torch.zeros_like(maximum)
    for rows in _row_chunks(logits):
        chunk = logits[rows]
        chunk_maximum = chunk.amax(dim=1).float()
        # The fused log-softmax beats separate passes; at the maximum it is -log of the sum.
        log_sum = -torch.log_softmax(chunk, dim=1, dtype=torch.float32).amax(dim=1)
        exp_sum[rows] = log_sum.exp_().masked_fill_(chunk_maximum == -torch.inf, 0.0)
        maximum[rows] = chunk_maximum.clamp_(min=_LOWEST)
    return maximum, exp_sum


def _softmax(logits: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.softmax(logits, dim=1, dtype=torch.float32)
    return torch.softmax(logits, dim=1, dtype=torch.float32, out=out)


def _select(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[i, columns[i]] in fp32, [n]; 0 where the rank holds no columns."""
    if logits.shape[1] == 0:
        return torch.zeros(logits.shape[:1], dtype=torch.float32, device=logits.device)
    return logits.gather(1, columns[:, None]).squeeze(1).to(torch.float32, copy=True)


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, each small enough for the cache; none if the tensor is empty."""
    if logits.numel() == 0:
        return
    budget = _GPU_CHUNK_ELEMENTS if logits.is_cuda else _CPU_CHUNK_ELEMENTS
    num_rows = max(1, budget // logits.shape[1])
    for start in range(0, logits.shape[0], num_rows):
        yield slice(start, start + num_rows)
