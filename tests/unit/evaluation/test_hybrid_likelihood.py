"""The bound of hybrid diffusion against entropies, enumeration and the masked bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_readers import Counted, Function, hash_model

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.evaluation.estimates import Likelihood, MaskDraws, Request
from megatron_dlm.evaluation.hybrid_bound import HybridBound
from megatron_dlm.evaluation.likelihood import score_diffusion
from megatron_dlm.evaluation.mask_bound import MaskBound
from megatron_dlm.objectives.noise import noise_path

MASK = 4  # text ids 0..3
NUM_IDS = 5
NOISES = {
    **{
        name: ObjectiveConfig(kind="hybrid", noise_type=name)  # type: ignore[arg-type]
        for name in ("masked", "low_uniform", "balanced", "high_uniform", "uniform")
    },
    "time": ObjectiveConfig(kind="hybrid", noise_type="time", uniform_probability=0.2),
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
LAW = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


def bound_of(noise: ObjectiveConfig, *, prompt_attention: bool = False) -> HybridBound:
    return HybridBound(noise_path(noise), MASK, NUM_IDS, prompt_attention)


def scored(
    requests: list[Request],
    noise: ObjectiveConfig,
    function: Function,
    draws: MaskDraws,
    **options: object,
) -> list[Likelihood]:
    bound = bound_of(noise)
    reader = Counted(function, (MASK,), measure=bound).reader
    options = {"batch_size": 64, **options}
    return score_diffusion(reader, requests, bound, draws=draws, **options)  # type: ignore[arg-type]


def constant_model(tokens: Tensor, real: Tensor) -> Tensor:
    logits = torch.cat([LAW.log(), torch.tensor([7.0]).double()])  # the mask must not count
    return logits.expand(*tokens.shape, NUM_IDS)


def enumerated_bound(answer: tuple[int, ...], noise: ObjectiveConfig, function: Function) -> float:
    """Quadrature over the level and a sum over all noisy texts, from whole distributions."""
    path, total = noise_path(noise), 0.0
    nodes, node_weights = np.polynomial.legendre.leggauss(80)
    noisy = torch.tensor(list(itertools.product(range(NUM_IDS), repeat=len(answer))))
    logits = function(noisy, torch.ones_like(noisy, dtype=torch.bool))
    guess = torch.softmax(logits[..., :MASK].double(), dim=2)  # of the text ids alone
    # Levels in log-SNR itself, where the integrand is smooth: the density cancels.
    high, low = path.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).log_snr.tolist()
    for node, node_weight in zip(nodes, node_weights, strict=True):
        log_snr = (high - low) / 2 * node + (high + low) / 2
        share, slope = (float(v) for v in path.mixing(torch.tensor(log_snr).double()))
        alpha = 1 / (1 + math.exp(-log_snr))
        pi = torch.tensor([share / MASK] * MASK + [1 - share], dtype=torch.float64)
        pi_slope = torch.tensor([slope / MASK] * MASK + [-slope], dtype=torch.float64)
        chance, sums = torch.ones(len(noisy)).double(), torch.zeros(len(noisy)).double()
        for slot, token in enumerate(answer):
            clean = torch.nn.functional.one_hot(torch.tensor(token), NUM_IDS).double()
            true = alpha * clean + (1 - alpha) * pi
            padded = torch.nn.functional.pad(guess[:, slot], (0, 1))
            model = alpha * padded + (1 - alpha) * pi
            z = noisy[:, slot]
            ratio = true[z] / model.gather(1, z[:, None])[:, 0]
            itakura_saito = ratio - ratio.log() - 1
            kl = torch.special.xlogy(true, true / model).nan_to_num().sum(1)
            weight = (1 - alpha) * (pi - pi_slope)[z] / true[z]
            sums += torch.where(true[z] > 0, weight * (kl + itakura_saito), 0.0)
            chance = chance * true[z]
        value = torch.where(chance > 0, chance * sums, 0.0).sum()
        total += (high - low) / 2 * float(node_weight) * float(value)
    return -total


@each_noise
def test_the_law_of_the_text_reaches_its_entropy(noise: ObjectiveConfig) -> None:
    """One token of known law: the reference averages to its entropy, and the draws to both."""
    entropy = -float((LAW * LAW.log()).sum())
    assert entropy == pytest.approx(1.20797, abs=1e-5)
    exact = [enumerated_bound((token,), noise, constant_model) for token in range(4)]
    # The ends of GIDD's path in time lie further inside.
    tolerance = 0.05 if noise.noise_type == "time" else 1.5e-3
    assert -float(LAW @ torch.tensor(exact).double()) == pytest.approx(entropy, abs=tolerance)
    requests = [Request((0, 1), (token,)) for token in range(4)]
    for one, expected in zip(
        scored(requests, noise, constant_model, MaskDraws(512, seed=3)), exact, strict=True
    ):
        assert abs(one.log_prob - expected) < 4 * one.standard_error


@each_noise
def test_draws_agree_with_enumeration_within_their_errors(noise: ObjectiveConfig) -> None:
    answer = (2, 0)
    function = hash_model(NUM_IDS, scale=1.5)
    exact = enumerated_bound(answer, noise, function)
    request = Request((), answer)
    found = [scored([request], noise, function, MaskDraws(256, seed=seed))[0] for seed in range(30)]
    errors = torch.tensor([one.log_prob - exact for one in found])
    stated = torch.tensor([one.standard_error for one in found])
    assert abs(float(errors.mean())) < 3.5 * float(errors.std()) / math.sqrt(16) + 2e-3
    assert 0.3 < float(stated.square().mean() / errors.square().mean()) < 4
    assert float(errors.std()) < 0.3 * abs(exact)


def test_masks_only_is_the_masked_bound() -> None:
    requests = [Request((1, 3), (2, 0, 1)), Request((), (3, 3))]

    def text_only(tokens: Tensor, real: Tensor) -> Tensor:
        logits = hash_model(NUM_IDS, scale=1.5)(tokens, real)
        logits[..., MASK] = -torch.inf
        return logits

    reader = Counted(text_only).reader
    draws = MaskDraws(enumerate_masks="always")
    exact = score_diffusion(reader, requests, MaskBound(MASK), draws=draws, batch_size=8)
    found = scored(requests, NOISES["masked"], text_only, MaskDraws(2000))
    for one, other in zip(exact, found, strict=True):
        assert other.standard_error < 0.1 * abs(one.log_prob)
        assert abs(one.log_prob - other.log_prob) < 4 * other.standard_error + 2e-3


@each_noise
def test_a_likelihood_does_not_depend_on_its_batch(noise: ObjectiveConfig) -> None:
    requests = [Request((1, 2, 3), (0, 3)), Request((2,), (0, 1, 2, 3, 3)), Request((), (1,))]
    function = hash_model(NUM_IDS)
    alone = [
        scored([request], noise, function, MaskDraws(9), batch_size=1, with_greedy=True)[0]
        for request in requests
    ]
    together = scored(
        [*requests, requests[0]], noise, function, MaskDraws(9), batch_size=4, with_greedy=True
    )
    for one, other in zip([*alone, alone[0]], together, strict=True):
        assert other.log_prob == pytest.approx(one.log_prob, rel=1e-5)
        assert other.is_greedy == one.is_greedy
        assert other.num_samples == 9
    other_seed = scored(requests, noise, function, MaskDraws(9, seed=1))
    assert other_seed[1].log_prob != alone[1].log_prob


@pytest.mark.parametrize("prompt_attention", [False, True])
def test_prompts_are_clean_and_blind_where_they_were_in_training(prompt_attention: bool) -> None:
    bound = bound_of(NOISES["balanced"], prompt_attention=prompt_attention)
    seen: list[Tensor] = []

    def function(tokens: Tensor, real: Tensor) -> Tensor:
        seen.append(tokens)
        return hash_model(NUM_IDS)(tokens, real)

    counted = Counted(function, measure=bound)
    requests = [Request((1, 2, 3), (0, 3)), Request((2,), (0, 1, 2, 3, 3))]
    score_diffusion(counted.reader, requests, bound, draws=MaskDraws(8), batch_size=100)
    (tokens,), (context,) = seen, counted.contexts
    assert tokens.shape[1] == 6
    is_long = tokens[:, 0] == 2  # the other text has padding there; equal inputs run once
    assert (tokens[~is_long, 1:4] == torch.tensor([1, 2, 3])).all()
    if not prompt_attention:
        assert context is None
        return
    assert context is not None
    counts = context.sum(1)
    assert torch.equal(counts, torch.where(is_long, 1, 3))
    assert context[counts == 1][:, 0].all()
    assert context[counts == 3][:, 1:4].all()


def test_greedy_answers_are_those_the_model_leaves() -> None:
    """Every token is the likeliest of its slot, given the answer itself."""
    laws = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.2, 0.1, 0.1, 0.6]], dtype=torch.float64).log()

    def function(tokens: Tensor, real: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, NUM_IDS), 5.0).double()
        logits[:, -2:, :MASK] = laws
        return logits

    requests = [Request((0,), answer) for answer in ((1, 3), (1, 0), (2, 3), (1, 3))]
    found = scored(requests, NOISES["uniform"], function, MaskDraws(2), with_greedy=True)
    assert [one.is_greedy for one in found] == [True, False, False, True]
