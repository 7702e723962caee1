"""mixture_divergences over real tensor-parallel ranks (gloo) against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from mixture_reference import Rows, divergences
from rank_pool import RankPool

from megatron_dlm.ops.mixture_loss import mixture_divergences

# (rows, padded vocabulary, vocabulary, mask): even; uneven padding with the mask on the last rank;
# a rank with padding only; a rank whose only real column is the mask; no rows at all.
SHAPES = [(18, 32, 32, 5), (24, 64, 57, 56), (9, 64, 30, 0), (12, 40, 21, 20), (0, 40, 33, 32)]
BIASES = [-1000.0, 0.0, 2.0, 1000.0]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, bias: float) -> Rows:
    num_rows, width, vocab_size, mask = shape
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(num_rows, width, generator=generator).mul(3)
    logits[:, vocab_size:] = 1e5
    logits[:, mask] = 1e5
    logits[: num_rows // 2, vocab_size // 2] += 1e4
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    targets = torch.where(targets == mask, (mask + 1) % vocab_size, targets)
    tokens = torch.where(torch.arange(num_rows) % 2 == 0, targets, mask)
    if num_rows > 0:
        logits[0, : width // 4] = -torch.inf  # the first of four ranks has no mass in this row
        targets[0] = tokens[0] = width // 4
    if bias == 1000:
        tokens = targets.roll(1)
    log_snr = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 18 - 9
    share = torch.sigmoid(log_snr + bias)
    return Rows(logits.to(dtype), tokens, targets, log_snr, share, vocab_size, mask)


def compare_all() -> int:
    num_comparisons = 0
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for bias in BIASES:
                compare(problem(shape, dtype, bias), dtype)
                num_comparisons += 1
    return num_comparisons


def compare(rows: Rows, dtype: torch.dtype) -> None:
    """Value, gradient and untouched input of this rank's shard."""
    num_rows, rank, size = len(rows.tokens), dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    of_kl, of_is = torch.randn(2, num_rows, generator=generator)
    of_is *= (1 - torch.sigmoid(rows.log_snr)).float()
    exact = divergences(rows, of_kl, of_is)

    shard = rows.logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    untouched = shard.detach().clone()
    kl, itakura_saito = mixture_divergences(
        shard,
        *rows[1:5],
        vocab_size=rows.vocab_size,
        mask_token_id=rows.mask_token_id,
        tp_group=dist.group.WORLD,
    )
    (kl * of_kl + itakura_saito * of_is).sum().backward()
    assert shard.grad is not None
    torch.testing.assert_close(kl.double(), exact.kl, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(itakura_saito.double(), exact.itakura_saito, rtol=1e-5, atol=2e-6)
    part = exact.gradient.chunk(size, dim=1)[rank]
    scale = 1 + (exact.itakura_saito * of_is).abs()[:, None]
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(shard.grad.double() / scale, part / scale, rtol=rounding, atol=2e-6)
    assert torch.equal(shard.detach(), untouched)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_split_vocabulary(ranks: RankPool, num_ranks: int) -> None:
    counts = ranks.run(compare_all, num_ranks=num_ranks)
    assert counts == [len(SHAPES) * 2 * len(BIASES)] * num_ranks
