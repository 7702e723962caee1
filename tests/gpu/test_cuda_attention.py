"""Flex attention on a GPU against dense attention, alone and in whole models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from option_runs import hiding_mask, logits_of, twofold
from test_model_options import MODELS, OBJECTIVES
from tiny_run import token_batch
from torch import Tensor

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.models.attention import CoreAttention
from megatron_dlm.models.attention_visibility import BlockDiffusion, Causal, Documents, Hidden
from megatron_dlm.models.dense_attention import dense_attention
from megatron_dlm.models.flexible_attention import flexible_attention
from megatron_dlm.ops.context_parallel import local_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, HEADS, GROUPS, LENGTH, WIDTH = 2, 4, 2, 300, 32
NUMBERS = torch.arange(LENGTH) // 37
RULES: dict[str, Any] = {
    "everything": None,
    "causal": Causal(),
    "mask": Hidden(hiding_mask(torch.arange(BATCH), LENGTH)),
    "blocks of 16": BlockDiffusion(LENGTH // 2, 16),
    "uneven blocks": BlockDiffusion(LENGTH // 2, 64),
    "documents": Documents(NUMBERS, is_causal=False),
    "causal documents": Documents(NUMBERS, is_causal=True),
}


def outcome(
    rule: Any,
    *,
    flexible: bool,
    soft_cap: float | None,
    has_sink: bool,
    length: int = LENGTH,
    share: tuple[int, int] = (0, 1),
) -> list[Tensor]:
    """Output, and the gradient of every input, on the CPU; of the queries of one of several ranks.

    share: (rank, ranks) of context parallelism.
    """
    device = "cuda" if flexible else "cpu"
    generator = torch.Generator().manual_seed(1)
    keys = (BATCH, GROUPS, length, WIDTH)
    shapes = [(BATCH, HEADS, length, WIDTH), keys, keys, *2 * [(GROUPS, WIDTH)]]
    inputs = [
        torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes
    ]
    if flexible and isinstance(rule, Hidden):
        rule = Hidden(rule.mask.to(device))
    if flexible and isinstance(rule, Documents):
        rule = Documents(rule.number.to(device), rule.is_causal)
    sink = (inputs[3], inputs[4]) if has_sink else None
    attend = flexible_attention if flexible else dense_attention
    rank, size = share
    places = local_slots(length, torch.device(device), rank=rank, size=size) if size > 1 else None
    query, key, value = inputs[:3]
    output = attend(
        query if places is None else query[:, :, places],
        key,
        value,
        rule,
        scale=WIDTH**-0.5,
        places=places,
        soft_cap=soft_cap,
        sink=sink,
    )
    factor = torch.randn(output.shape, generator=generator).to(device)
    (output * factor).sum().backward()
    return [output.detach().cpu()] + [part.grad.cpu() for part in inputs if part.grad is not None]


@pytest.mark.parametrize("has_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("name", RULES)
def test_flexible_attention(name: str, soft_cap: float | None, has_sink: bool) -> None:
    torch._dynamo.reset()  # it keeps only so many programs, and every rule is one
    check(RULES[name], soft_cap=soft_cap, has_sink=has_sink)


def test_lengths_may_change() -> None:
    torch._dynamo.reset()
    for length in (300, 284, 128, 500):
        check(Causal(), soft_cap=3.0, has_sink=True, length=length)


@pytest.mark.parametrize("name", RULES)
def test_queries_of_a_context_parallel_rank(name: str) -> None:
    torch._dynamo.reset()
    check(RULES[name], soft_cap=3.0, has_sink=True, share=(1, 2))


def check(
    rule: Any,
    *,
    soft_cap: float | None,
    has_sink: bool,
    length: int = LENGTH,
    share: tuple[int, int] = (0, 1),
) -> None:
    ours, theirs = (
        outcome(
            rule,
            flexible=flexible,
            soft_cap=soft_cap,
            has_sink=has_sink,
            length=length,
            share=share,
        )
        for flexible in (True, False)
    )
    assert len(ours) == len(theirs) == (6 if has_sink else 4)
    for mine, wanted in zip(ours, theirs, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("objective", ["causal", "bidirectional", "arbitrary", "block"])
@pytest.mark.parametrize("name", ["none", "everything"])
@pytest.mark.parametrize(
    ("implementation", "precision", "tolerance"), [("local", "fp32", 1e-4), ("auto", "bf16", 0.1)]
)
def test_models(
    implementation: str,
    precision: str,
    tolerance: float,
    name: str,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mean differences of logits with a standard deviation of one to three."""
    # A head is at least 16 wide in flex attention's kernels.
    model = dataclasses.replace(MODELS[name], kv_channels=16)
    kind = OBJECTIVES[objective]
    tokens = token_batch(0, 2, 16, documents=False).tokens[:, :-1]
    if kind.attention is AttentionPattern.BLOCK:
        tokens = twofold(tokens)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        chosen = dataclasses.replace(model, transformer_impl=implementation)
        [ours] = logits_of(chosen, kind, [tokens], device="cuda", precision=precision)
        monkeypatch.setattr(CoreAttention, "_is_flexible", lambda *_: False)
        plain = dataclasses.replace(model, transformer_impl="local")
        [wanted] = logits_of(plain, kind, [tokens], device="cuda")
    finally:
        dist.destroy_process_group()
    assert (ours - wanted).abs().mean() < tolerance
