"""The divergences of hybrid diffusion on a GPU, by Triton where PyTorch brings it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from mixture_reference import Rows, divergences

from megatron_dlm.ops import mixture_loss, mixture_rows
from megatron_dlm.ops.mixture_loss import mixture_divergences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("passes", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1000.0, 0.0, 2.0])
@pytest.mark.parametrize("mask_token_id", [3, 49_999])
def test_mixture_divergences_equal_float64(
    passes: str,
    dtype: torch.dtype,
    bias: float,
    mask_token_id: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if passes == "torch":
        monkeypatch.setattr(mixture_loss, "_passes", lambda _: mixture_rows)
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(96, 50_048, generator=generator).mul(3).to(dtype)
    targets = torch.randint(4, 49_999, (96,), generator=generator)
    tokens = torch.where(torch.arange(96) % 2 == 0, targets, mask_token_id)
    log_snr = torch.rand(96, generator=generator, dtype=torch.float64) * 18 - 9
    rows = Rows(
        logits, tokens, targets, log_snr, torch.sigmoid(log_snr + bias), 50_000, mask_token_id
    )
    of_kl, of_is = torch.randn(2, 96, generator=generator)
    of_is *= (1 - torch.sigmoid(log_snr)).float()
    exact = divergences(rows, of_kl, of_is)

    leaf = logits.cuda().requires_grad_()
    kl, itakura_saito = mixture_divergences(
        leaf,
        *(field.cuda() for field in rows[1:5]),
        vocab_size=50_000,
        mask_token_id=mask_token_id,
        tp_group=None,
    )
    (kl * of_kl.cuda() + itakura_saito * of_is.cuda()).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(kl.cpu().double(), exact.kl, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(
        itakura_saito.cpu().double(), exact.itakura_saito, rtol=1e-5, atol=3e-6
    )
    scale = 1 + (exact.itakura_saito * of_is).abs()[:, None]
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        leaf.grad.cpu().double() / scale, exact.gradient / scale, rtol=rounding, atol=2e-6
    )
