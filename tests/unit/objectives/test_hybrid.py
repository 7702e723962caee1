"""The law of hybrid corruption: levels, noise and weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hybrid_law import PATHS
from hybrid_setting import (
    LENGTH,
    MASK_ID,
    VOCAB_SIZE,
    make_batch,
    make_objective,
    prepare,
)
from mixture_reference import Rows, values
from scipy import stats
from torch import Tensor

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.noise import NoiseLevels, NoisePath, SigmoidNoise, TimeNoise
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_levels_are_stratified_over_the_global_batch(batch_size: int) -> None:
    objective = make_objective(batch_size=batch_size)
    for step in (0, 1, 1000):
        inputs = prepare(objective, make_batch(batch_size, 4, step * batch_size))
        time = torch.sigmoid(-inputs.noise_level[:, 0].double())
        draws = (time - 1 / (1 + math.exp(9))) / LENGTH
        assert inputs.noise_level.std(1).max() == 0
        strata = np.floor(draws.numpy() * batch_size + 1e-4).astype(int)
        assert sorted(strata % batch_size) == list(range(batch_size))


@dataclass(frozen=True)
class Still(SigmoidNoise):
    """Every token at one level."""

    log_snr: float = 0.0

    def at(self, draw: Tensor) -> NoiseLevels:
        log_snr = torch.full_like(draw, self.log_snr)
        return NoiseLevels(log_snr, *self.mixing(log_snr), torch.ones_like(draw))


@pytest.mark.parametrize("log_snr", [-3.0, 0.2, 2.5])
@pytest.mark.parametrize("bias", [-1000.0, -2.0, 0.0, 1000.0])
def test_noise_follows_its_law(log_snr: float, bias: float) -> None:
    """Kept, masked and every text id as often as alpha x + (1 - alpha) pi says, slot by slot."""
    objective = replace(make_objective(), path=Still(1.0, bias, log_snr))
    clean = 7
    tokens = torch.full((40, 2001), clean)
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(40))
    noisy = prepare(objective, batch).tokens
    alpha, share = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(-log_snr - max(bias, -600)))
    expected = np.full(VOCAB_SIZE, (1 - alpha) * share / (VOCAB_SIZE - 1))
    expected[MASK_ID] = (1 - alpha) * (1 - share)
    expected[clean] += alpha
    observed = np.bincount(noisy.flatten().numpy(), minlength=VOCAB_SIZE)
    possible = expected > 1e-12
    assert observed[~possible].sum() == 0
    total = expected[possible] * noisy.numel()
    assert stats.chisquare(observed[possible], total * observed.sum() / total.sum()).pvalue > 1e-4
    # No sample repeats the noise of another.
    same = (noisy[1:] == noisy[:-1]).double().mean().item()
    chance = float((expected**2).sum())
    assert abs(same - chance) < 5 * math.sqrt(chance * (1 - chance) / noisy[1:].numel()) + 1e-12


def reference_weight(path: NoisePath, noisy: int, clean: int, log_snr: float) -> float:
    """w(z, x) from its definition, with plain floats."""
    share, slope = (float(x) for x in path.mixing(torch.tensor(log_snr, dtype=torch.float64)))
    num_text = VOCAB_SIZE - 1
    noise, growth = (
        (1 - share, -slope) if noisy == MASK_ID else (share / num_text, slope / num_text)
    )
    return (noise - growth) / (noise + (math.exp(log_snr) if noisy == clean else 0.0))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("weighting", ["elbo", "surrogate"])
def test_weights_are_those_of_the_formula(name: str, weighting: str) -> None:
    objective = make_objective(name, weighting=weighting)
    inputs = prepare(objective, make_batch(16, 12))
    for row, slot in itertools.product(range(16), range(12)):
        level = inputs.noise_level[row, slot].item()
        place = inputs.tokens[row, slot].item(), inputs.targets[row, slot].item()
        weight = reference_weight(objective.path, int(place[0]), int(place[1]), level)
        if isinstance(objective.path, SigmoidNoise):
            alpha = 1 / (1 + math.exp(-level))
            bound = weight * LENGTH / (alpha * (1 - alpha))
        else:  # the density of the time form is checked in test_noise.py
            bound = inputs.elbo_weights[row, slot].item()
        expected = bound if weighting == "elbo" else weight
        assert inputs.elbo_weights[row, slot].item() == pytest.approx(bound, rel=2e-6)
        assert inputs.weights[row, slot].item() == pytest.approx(expected, rel=2e-6)


def test_dynamic_weights_are_those_of_gidd() -> None:
    objective = make_objective("time 0.2", weighting="dynamic")
    inputs = prepare(objective, make_batch(16, 200))
    amplitude = 2 * 0.2 / 0.8
    on_clean = amplitude / VOCAB_SIZE * torch.exp(-inputs.noise_level.double() / 2)
    is_clean, is_mask = inputs.tokens == inputs.targets, inputs.tokens == MASK_ID
    assert 2 * is_clean.sum() > is_mask.sum() > 100
    assert torch.all(inputs.weights[is_mask] == 2)
    assert torch.all(inputs.weights[~is_mask & ~is_clean] == 1)
    expected = on_clean[is_clean].clamp(max=2).float()
    torch.testing.assert_close(inputs.weights[is_clean], expected)
    elbo = prepare(make_objective("time 0.2"), make_batch(16, 200))
    assert torch.equal(inputs.elbo_weights, elbo.elbo_weights)
    # The published weight is what the bound gives a clean token in units of an uniform one.
    small = TimeNoise(1e-4)
    ratio = [reference_weight(small, 3, clean, -2.0) for clean in (3, 5)]
    published = small.amplitude / (VOCAB_SIZE - 1) * math.exp(1.0)
    assert ratio[0] / ratio[1] == pytest.approx(published, rel=1e-3)


def test_weights_are_clipped() -> None:
    @dataclass(frozen=True)
    class Thin(SigmoidNoise):
        def at(self, draw: Tensor) -> NoiseLevels:
            return replace(super().at(draw), density=torch.full_like(draw, 1e-9))

    objective = replace(make_objective(weighting="surrogate"), path=Thin(1.0, 0.0))
    inputs = prepare(objective, make_batch(16, 64))
    assert inputs.elbo_weights.max() == 1e6
    steep = replace(make_objective(weighting="surrogate"), path=Steep(1.0, 0.0))
    weights = prepare(steep, make_batch(16, 64)).weights
    assert (weights.min().item(), weights.max().item()) == (0, 1e3)


class Steep(SigmoidNoise):
    """A slope that no share has, so that weights leave their range on both sides."""

    def mixing(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        share, _ = super().mixing(log_snr)
        return share, torch.full_like(share, 1e5)


def test_only_masks_is_masked_diffusion() -> None:
    """Weights, loss, bound and gradient are the closed forms: cross entropy / t, (1 - t) of it."""
    batch = make_batch(16, 64)
    logits = torch.randn(16, 64, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2
    for weighting in ("elbo", "surrogate"):
        objective = make_objective("masked", weighting=weighting)
        inputs = prepare(objective, batch)
        masked = inputs.tokens == MASK_ID
        assert torch.equal(inputs.tokens[~masked], inputs.targets[~masked])
        assert torch.equal(inputs.scored, masked)
        time = torch.sigmoid(-inputs.noise_level[masked].double())
        weights = LENGTH / (time * (1 - time))
        torch.testing.assert_close(inputs.elbo_weights[masked].double(), weights, rtol=1e-5, atol=0)
        leaf = logits[masked].clone().requires_grad_()
        terms = micro_batch_loss(objective, leaf, inputs, None)
        terms.loss_sum.backward()

        exact = logits[masked].double().requires_grad_()
        text = exact.index_fill(1, torch.tensor([MASK_ID]), -torch.inf).log_softmax(1)
        nll = -text.gather(1, inputs.targets[masked][:, None]).squeeze(1)
        bound = LENGTH * (nll / time).sum()
        loss = bound if weighting == "elbo" else ((1 - time) * nll).sum()
        loss.backward()
        assert terms.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
        assert terms.metrics["nelbo"][0].item() == pytest.approx(bound.item(), rel=1e-5)
        assert terms.metrics["kl"][0].item() == pytest.approx(bound.item(), rel=1e-5)
        assert terms.metrics["itakura_saito"][0].item() == 0
        assert terms.metrics["noised_share"] == (masked.sum(), masked.numel())
        assert leaf.grad is not None
        assert exact.grad is not None
        gradient = torch.nan_to_num(exact.grad).float()
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)


def test_only_masks_draws_the_masks_of_masked_diffusion() -> None:
    """The same random numbers decide: at one level the same tokens are masked."""
    masked = build_objective(
        ObjectiveConfig(time_floor=1 / (1 + math.exp(9))),
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=16,
        training=True,
    )
    batch = make_batch(16, 400)
    theirs = masked.prepare(batch, 5, Stream.TRAINING).tokens
    ours = prepare(make_objective("masked"), batch).tokens
    assert (ours != theirs).double().mean() < 2e-3  # the levels differ by up to 1e-4


@pytest.mark.parametrize("name", ["uniform", "balanced", "time 0.2"])
def test_loss_and_metrics_are_those_of_the_full_vocabulary(name: str) -> None:
    objective = make_objective(name, weighting="surrogate")
    inputs = prepare(objective, make_batch(16, 32))
    logits = torch.randn(16, 32, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    terms = micro_batch_loss(objective, logits[inputs.scored], inputs, None)
    level = inputs.noise_level.flatten().double()
    share, _ = objective.path.mixing(level)
    ids = inputs.tokens.flatten(), inputs.targets.flatten()
    logits = logits.flatten(0, 1).double()
    kl, itakura_saito = values(logits, Rows(logits, *ids, level, share, VOCAB_SIZE, MASK_ID))
    elbo, weights = (x.flatten().double() for x in (inputs.elbo_weights, inputs.weights))
    itakura_saito = torch.where(elbo > 0, itakura_saito, 0.0)
    expected = {
        "loss": (weights * (kl + itakura_saito)).sum(),
        "nelbo": (elbo * (kl + itakura_saito)).sum(),
        "kl": (elbo * kl).sum(),
        "itakura_saito": (elbo * itakura_saito).sum(),
        "noised_share": (inputs.tokens != inputs.targets).sum(),
    }
    assert tuple(terms.metrics) == objective.metric_names
    for key, (total, count) in terms.metrics.items():
        assert total.item() == pytest.approx(expected[key].item(), rel=1e-4), key
        assert count == 16 * 32
    assert terms.loss_sum.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    if name == "uniform":
        assert not torch.any(inputs.tokens == MASK_ID)
        assert torch.all(inputs.scored)
