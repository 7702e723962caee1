"""log_prob over real tensor-parallel ranks (gloo) against one float64 log-softmax.

Run as a script, this file is one rank: `test_vocab_parallel.py RANK WORLD_SIZE STORE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dlm.ops.vocab_parallel import log_prob

WORLD_SIZE = 4
TIMEOUT_SECONDS = 120
# (rows, padded vocabulary, vocabulary): even; uneven padding; a rank with padding only; all but one
# rank with padding only; no rows at all.
SHAPES = [(17, 32, 32), (23, 64, 57), (9, 64, 30), (11, 40, 3), (0, 40, 33)]
DTYPES = [torch.float32, torch.bfloat16]


def test_two_and_four_ranks(tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(WORLD_SIZE), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        outputs = [
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
            for process in ranks
        ]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output}"
        assert f"{2 * len(SHAPES) * len(DTYPES) * 2} comparisons" in output


def run_rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    num_comparisons = 0
    for group in (pairs[rank // 2], dist.group.WORLD):
        for shape in SHAPES:
            for dtype in DTYPES:
                for offset in (0.0, 1e4):
                    compare(shape, dtype, offset, group)
                    num_comparisons += 1
    dist.destroy_process_group()
    print(f"{num_comparisons} comparisons")


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


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
