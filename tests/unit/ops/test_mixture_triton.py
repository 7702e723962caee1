"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference.

Run as a script, this file makes the comparisons; TRITON_INTERPRET has to be set before the import.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# (rows, padded vocabulary, vocabulary, mask)
SHAPES = [(12, 64, 50, 49), (9, 40, 40, 3), (6, 5000, 4999, 0), (0, 40, 33, 32)]
BIASES = [-1000.0, 0.0, 1000.0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter() -> None:
    environment = dict(
        os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert f"{2 * 2 * len(SHAPES) * len(BIASES)} comparisons" in done.stdout


def compare_all() -> int:
    import torch

    from megatron_dlm.ops import mixture_loss, mixture_loss_triton

    mixture_loss._passes = lambda _: mixture_loss_triton  # type: ignore[assignment]
    num_comparisons = 0
    for shape in SHAPES:
        for bias in BIASES:
            for dtype in (torch.float32, torch.bfloat16):
                for offset in (0.0, 1e4):
                    compare(shape, bias, dtype, offset)
                    num_comparisons += 1
    return num_comparisons


def compare(shape, bias, dtype, offset) -> None:
    import torch
    from mixture_reference import Rows, divergences

    from megatron_dlm.ops.mixture_loss import mixture_divergences

    num_rows, width, vocab_size, mask = shape
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(num_rows, width, generator=generator).mul(3)
    logits[::2, vocab_size // 2] += offset
    logits[:, vocab_size:] = torch.nan
    logits[:, mask] = 1e5
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    targets = torch.where(targets == mask, (mask + 1) % vocab_size, targets)
    tokens = torch.where(torch.arange(num_rows) % 2 == 0, targets, mask)
    if bias == 1000:
        tokens = targets.roll(1)
    log_snr = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 18 - 9
    rows = Rows(
        logits.to(dtype), tokens, targets, log_snr, torch.sigmoid(log_snr + bias), vocab_size, mask
    )
    of_kl, of_is = torch.randn(2, num_rows, generator=generator)
    of_is *= (1 - torch.sigmoid(log_snr)).float()
    exact = divergences(rows._replace(logits=rows.logits.nan_to_num()), of_kl, of_is)

    leaf = rows.logits.clone().requires_grad_()
    kl, itakura_saito = mixture_divergences(
        leaf, *rows[1:5], vocab_size=vocab_size, mask_token_id=mask, tp_group=None
    )
    (kl * of_kl + itakura_saito * of_is).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(kl.double(), exact.kl, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(itakura_saito.double(), exact.itakura_saito, rtol=1e-5, atol=2e-6)
    scale = 1 + (exact.itakura_saito * of_is).abs()[:, None]
    rounding = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts digits off
    torch.testing.assert_close(
        leaf.grad.double() / scale, exact.gradient / scale, rtol=rounding, atol=2e-6
    )


if __name__ == "__main__":
    print(f"{compare_all()} comparisons")
