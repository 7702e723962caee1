"""log_prob over real tensor-parallel ranks (gloo) against one float64 log-softmax."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_pool import RankPool

from megatron_dlm.ops.vocab_parallel import log_prob

WORLD_SIZE = 4
# (rows, padded vocabulary, vocabulary): even; uneven padding; a rank with padding only; all but one
# rank with padding only; no rows at all.
SHAPES = [(17, 32, 32), (23, 64, 57), (9, 64, 30), (11, 40, 3), (0, 40, 33)]
DTYPES = [torch.float32, torch.bfloat16]


def test_two_and_four_ranks(ranks: RankPool) -> None:
    counts = ranks.run(compare_all, num_ranks=WORLD_SIZE)
    assert counts == [2 * len(SHAPES) * len(DTYPES) * 2] * WORLD_SIZE


def compare_all() -> int:
    """On one rank: within its pair of ranks, and within all four."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    num_comparisons = 0
    for group in (pairs[dist.get_rank() // 2], dist.group.WORLD):
        for shape in SHAPES:
            for dtype in DTYPES:
                for offset in (0.0, 1e4):
                    compare(shape, dtype, offset, group)
                    num_comparisons += 1
    return num_comparisons


def compare(
    shape: tuple[int, int, int], dtype: torch.dtype, offset: float, group: dist.ProcessGroup
) -> None:
    """Value, gradient and untouched input of this rank's shard; offset makes one token extreme."""
    num_rows, width, vocab_size = shape
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(num_rows, width, generator=generator).mul(3)
    logits[:, vocab_size // 2] += offset
    logits[:, vocab_size:] = 1e5
    logits = logits.to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    quarter = width // WORLD_SIZE
    if num_rows > 0 and quarter < vocab_size:
        logits[0, :quarter] = -torch.inf  # the first of four ranks has no mass in this row
        targets[0] = quarter
    weights = torch.randn(num_rows, generator=generator)

    exact = logits.double().requires_grad_()
    expected = exact[:, :vocab_size].log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights.double()).sum().backward()
    assert exact.grad is not None

    rank, size = group.rank(), group.size()
    shard = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    untouched = shard.detach().clone()
    value = log_prob(shard, targets, vocab_size=vocab_size, tp_group=group)
    (value * weights).sum().backward()
    assert shard.grad is not None
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        shard.grad.double(), exact.grad.chunk(size, dim=1)[rank], rtol=rounding, atol=1e-6
    )
    assert torch.equal(shard.detach(), untouched)
