"""Attention written down slowly, in float64: one query after the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flexible

from megatron_dlm.models.attention import CoreAttention

HEADS, WIDTH = 4, 8
_ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
ALONE = SimpleNamespace(tp=_ONE_RANK, cp=_ONE_RANK)
"""Process groups of one rank, which no one asks for more than their size and rank."""


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    soft_cap: float | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """query [b, heads, q, d], key, value [b, groups, k, d], visible [b, q, k], sink [groups, d].

    Returns [b, heads, q, d]; everything in float64.
    """
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for row, head, slot in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        group = head // repeats
        seen = visible[row, slot]
        keys, values = key[row, group][seen], value[row, group][seen]
        if sink is not None:
            keys = torch.cat([sink[0][group][None], keys])
            values = torch.cat([sink[1][group][None], values])
        scores = keys @ query[row, head, slot] / query.shape[3] ** 0.5
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        rows.append(scores.exp() / scores.exp().sum() @ values)
    return torch.stack(rows).view(query.shape)


def block_visible(half: int, block: int) -> Tensor:
    """bool [2 * half, 2 * half] of block diffusion, slot by slot."""
    seen = torch.zeros(2 * half, 2 * half, dtype=torch.bool)
    for query in range(2 * half):
        for key in range(2 * half):
            query_block, key_block = query % half // block, key % half // block
            if query < half and key < half:
                seen[query, key] = query_block == key_block
            elif query < half <= key:
                seen[query, key] = key_block < query_block
            elif query >= half and key >= half:
                seen[query, key] = key_block <= query_block
    return seen


def take_flexible_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CoreAttention do on the CPU what it does on a GPU, with PyTorch's slow plain kernel."""
    # PyTorch refuses gradients there, where its plain backward pass is right.
    monkeypatch.setattr(torch_flexible, "_validate_device", lambda *_: None)
    torch._dynamo.reset()  # it keeps only so many programs, and every rule is one

    def is_flexible(self: CoreAttention, query: Tensor, *, is_masked: bool = False) -> bool:
        return is_masked or not self.options.is_fused

    monkeypatch.setattr(CoreAttention, "_is_flexible", is_flexible)


def draw(*shapes: tuple[int, ...], seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """Normal numbers in fp32 that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def in_double(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in float64, with gradients of their own."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def check_gradients(ours: Tensor, theirs: Tensor, mine: list[Tensor], exact: list[Tensor]) -> None:
    """Of one random weighted sum of the outputs, by every input."""
    factor = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    (ours * factor).sum().backward()
    (theirs * factor.double()).sum().backward()
    for index, (got, wanted) in enumerate(zip(mine, exact, strict=True)):
        assert got.grad is not None
        assert wanted.grad is not None
        scale = float(wanted.grad.abs().max())
        assert scale > 0, f"input {index} has no gradient"
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=0, atol=1e-5 * scale)
