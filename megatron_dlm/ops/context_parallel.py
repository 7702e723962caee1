"""One sequence on several ranks: who holds which slots, and how attention reaches the others.

The sequence is cut into 2 n equal chunks for n ranks; rank r holds chunks r and 2 n - 1 - r, in
this order: the split of Megatron Core and Transformer Engine. Under causal attention an early chunk
has few keys and a late one many, so all ranks work alike. For block diffusion, [noisy; clean], it
gives rank r noisy chunk r and clean chunk n - 1 - r, of n each: as many slots to score on every
rank, and alike work again, since a slot of either half sees the clean slots up to its block.
Bidirectional attention would take any split.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.ops.batch import ModelInputs


def context_slice(inputs: ModelInputs, *, rank: int, size: int) -> ModelInputs:
    """The slots of one of `size` ranks: fields [b, s] -> [b, s / size]."""
    return inputs.map(lambda values: local_part(values, 1, rank=rank, size=size))


def local_part(whole: Tensor, dim: int, *, rank: int, size: int) -> Tensor:
    """One rank's slots of a sequence that runs along `dim`, of a multiple of 2 * size slots."""
    if size == 1:
        return whole
    length = whole.shape[dim]
    assert length % (2 * size) == 0, f"{length} slots are not 2 * {size} equal chunks"
    chunks = whole.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


@lru_cache(maxsize=16)  # one tensor for all layers and micro-batches: masks are cached by it
def local_slots(length: int, device: torch.device, *, rank: int, size: int) -> Tensor:
    """int64 [length / size]: where one rank's slots stand in the sequence of all."""
    return local_part(torch.arange(length, device=device), 0, rank=rank, size=size)


def in_order(parts: Tensor) -> Tensor:
    """[n, s, ...], the slots of n ranks -> [n * s, ...], the sequence."""
    early, late = parts.chunk(2, dim=1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def by_rank(whole: Tensor, size: int) -> Tensor:
    """[n * s, ...], the sequence -> [n, s, ...], the slots of n = size ranks."""
    early, late = whole.reshape(2, size, -1, *whole.shape[1:])
    return torch.cat([early, late.flip(0)], dim=1)


def gather_sequence(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [s, ...] of this rank's slots -> those of the sequence, [n * s, ...].

    The backward pass sums over the ranks what each of them found for a slot.
    """
    both = torch.stack([key, value], dim=1)
    parts: Tensor = _AllGather.apply(both, group)  # type: ignore[no-untyped-call]
    whole_key, whole_value = in_order(parts).unbind(1)
    return whole_key, whole_value


def slots_for_heads(parts: Sequence[Tensor], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Each [s, b, heads, d] of this rank's slots -> [n * s, b, heads / n, d]: some heads of all.

    Rank r gets the r-th n-th of the heads of every part; all parts travel in one exchange.
    """
    shares = [torch.stack(part.chunk(group.size(), dim=2)) for part in parts]
    widths = [share.shape[3] for share in shares]
    received: Tensor = _AllToAll.apply(torch.cat(shares, dim=3), group)  # type: ignore[no-untyped-call]
    return torch.split(in_order(received), widths, dim=2)


def heads_for_slots(whole: Tensor, group: ProcessGroup) -> Tensor:
    """[n * s, b, w] of this rank's heads -> [s, b, n * w] of all heads for this rank's slots."""
    sent = by_rank(whole, group.size())
    received: Tensor = _AllToAll.apply(sent, group)  # type: ignore[no-untyped-call]
    return received.movedim(0, 2).flatten(2)


class _AllGather(torch.autograd.Function):
    """[s, ...] of every rank -> [n, s, ...]."""

    @staticmethod
    def forward(context: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        gathered = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        return gathered.view(group.size(), *part.shape)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        summed = torch.empty_like(gradient[0], memory_format=torch.contiguous_format)
        whole = gradient.flatten(0, 1).contiguous()
        dist.reduce_scatter_tensor(summed, whole, group=context.group)
        return summed, None


class _AllToAll(torch.autograd.Function):
    """[n, ...]: entry k goes to rank k and comes to lie where this rank's number is."""

    @staticmethod
    def forward(context: Any, sent: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        return _exchanged(sent, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return _exchanged(gradient, context.group), None


def _exchanged(sent: Tensor, group: ProcessGroup) -> Tensor:
    received = torch.empty_like(sent, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    return received
