"""What only a GPU can show: the same noise as on CPU, and the same training within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import arguments, metrics, start
from tiny_corpus import TinyCorpus

from megatron_dlm.ops.counter_rng import Purpose, Stream, normal, random_bits
from megatron_dlm.ops.vocab_parallel import log_prob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(64, device=device)[:, None], torch.arange(4096, device=device)[None, :]


def test_noise_is_bit_equal_to_the_cpu() -> None:
    here, there = (random_bits(7, Stream.TRAINING, Purpose.MASK, *on(d)) for d in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


def test_initial_weights_equal_the_cpu_to_a_unit_in_the_last_place() -> None:
    here, there = (normal(7, Stream.INITIALIZATION, 3, *on(d)) for d in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, rtol=2**-23, atol=0)


def test_log_prob_and_gradient_equal_float64() -> None:
    logits = torch.randn(512, 1024, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1000, (512,), device="cuda")
    ours = log_prob(logits, targets, vocab_size=1000, tp_group=None)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    double = logits.detach().double()[:, :1000].requires_grad_()
    theirs = torch.log_softmax(double, dim=1).gather(1, targets[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(theirs.sum(), double)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :1000].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["local", "auto"])
def test_training_follows_the_cpu(
    implementation: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The command line on both devices in fp32, in processes of their own."""
    curves = {}
    for device, choice in (("cpu", "local"), ("cuda", implementation)):
        run = tmp_path / device
        flags = {"train__device": device, "model__transformer_impl": choice}
        command = arguments(tiny_corpus, run, **flags)
        ended = start(command, tmp_path / f"log_{device}", imports=True).end()
        assert ended.code == 0, ended.errors
        curves[device] = metrics(run)
    for step, entry in curves["cpu"].items():
        assert curves["cuda"][step]["nelbo"] == pytest.approx(entry["nelbo"], rel=1e-3), step
