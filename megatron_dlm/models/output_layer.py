"""The output layer and its loss on a few rows at a time: no logits of a whole micro-batch live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits [k, V/tp] and the place of their rows among all -> the summed loss, fp32 [], with its
gradient, and other sums, fp32 [m]. Both must add up over any split of the rows."""


def chunked_loss(
    layer: nn.Module,
    hidden: Tensor,
    weight: Tensor | None,
    loss_of: RowLoss,
    *,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """The sums of loss_of over all rows: fp32 [], with gradient, and fp32 [m], without.

    layer: Megatron's ColumnParallelLinear without bias, whose sequence_parallel is off; it is
    called once per chunk, with its hooks. hidden [n, h]: the same rows on every TP rank. weight
    [V/tp, h]: the layer's if None. If gradients are wanted, the forward pass computes those of each
    chunk at once and keeps [n, h] and, in fp32, [V/tp, h] of them; the backward pass, which may run
    only once, scales them. Collectives: those of layer and loss_of, per chunk of at most
    chunk_rows rows and for one empty chunk if n is 0; none in the backward pass.
    """
    assert chunk_rows > 0, chunk_rows
    head = _Head(layer, loss_of, chunk_rows)
    matrix = layer.weight if weight is None else weight
    assert isinstance(matrix, Tensor)
    if torch.is_grad_enabled() and (hidden.requires_grad or matrix.requires_grad):
        result: tuple[Tensor, Tensor] = _ChunkedLoss.apply(hidden, matrix, head)
        return result
    return _sum([head.loss(hidden[rows], matrix, rows)[1:] for rows in head.chunks(hidden)])


@dataclass(frozen=True)
class _Head:
    layer: nn.Module
    loss_of: RowLoss
    chunk_rows: int

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """At least one, so that every rank takes part in the collectives of the loss."""
        for start in range(0, max(1, hidden.shape[0]), self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def loss(self, hidden: Tensor, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [k, V/tp], summed loss [] and other sums [m] of one chunk."""
        logits, bias = self.layer(hidden, weight=weight)
        assert bias is None, "an output layer without bias"
        return logits, *self.loss_of(logits, rows)


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are known before the backward pass begins: the loss is a sum over rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        # The layer takes a weight without gradient for a frozen one and leaves ours to us, but for
        # the gradient of its input, which it sums over the TP ranks as ever.
        frozen = weight.detach()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        )
        sums = []
        for rows in head.chunks(hidden):
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_()
                logits, loss, others = head.loss(leaf, frozen, rows)
                of_hidden, of_logits = torch.autograd.grad(loss, (leaf, logits))
            grad_hidden[rows] = of_hidden
            if grad_weight is not None:
                _accumulate(grad_weight, of_logits, leaf.detach())
            sums.append((loss.detach(), others))
            del logits, loss, of_logits  # before the next chunk makes its own
        ctx.gradients = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        total, others = _sum(sums)
        ctx.mark_non_differentiable(others)
        return total, others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of chunked_loss runs once: it scales in place")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad_loss), grad_weight, None


def _accumulate(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits^T hidden to total, fp32 [V/tp, h]."""
    if grad_logits.dtype == hidden.dtype == total.dtype:
        total.addmm_(grad_logits.t(), hidden)
    else:
        total += grad_logits.t() @ hidden.to(grad_logits.dtype)


def _sum(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, others = zip(*pairs, strict=True)
    return torch.stack(losses).sum(), torch.stack(others).sum(dim=0)
