"""The law of hybrid sampling: the process by its matrices, and texts by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact_models import MASK, NUM_IDS, Toy, masked_model, p_value, random_joint, words

from megatron_dlm.generation.hybrid_noise import HybridNoise, Level, NoiseProcess
from megatron_dlm.generation.hybrid_samplers import HybridDecoding, sample_hybrid

ROWS = 20_000
NOISES = {
    "masked": HybridNoise(-1000.0),
    "low_uniform": HybridNoise(-2.0),
    "balanced": HybridNoise(0.0),
    "slow": HybridNoise(0.5, scale=0.3),
    "uniform": HybridNoise(1000.0),
    "time": HybridNoise(uniform_probability=0.2),
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
BALANCED = HybridNoise()


def nothing() -> torch.Tensor:
    return torch.zeros(ROWS, 0, dtype=torch.int64)


def noise_matrix(level: Level) -> torch.Tensor:
    """q(z | x) over the ids and the mask, float64 [N, N], with the clean token in rows."""
    pi = torch.tensor([level.one_text_id] * NUM_IDS + [level.mask], dtype=torch.float64)
    return level.clean * torch.eye(NUM_IDS + 1, dtype=torch.float64) + pi


@each_noise
def test_the_process_moves_from_level_to_level(noise):
    """q_t is q_s followed by the transition, whose probabilities are none below zero."""
    process = NoiseProcess(noise, MASK, NUM_IDS + 1)
    levels = process.levels("cosine", 30)
    assert levels[0].clean == pytest.approx(1 / (1 + math.exp(9)))
    assert levels[-1] == Level(1.0, 0.0, 0.0)
    for now, after in itertools.pairwise(levels):
        assert now.clean + NUM_IDS * now.one_text_id + now.mask == pytest.approx(1)
        ratio = now.clean / after.clean
        new = [now.one_text_id - ratio * after.one_text_id, now.mask - ratio * after.mask]
        assert min(new) > -1e-15
        pi = torch.tensor([new[0]] * NUM_IDS + [new[1]], dtype=torch.float64)
        step = ratio * torch.eye(NUM_IDS + 1, dtype=torch.float64) + pi
        assert torch.allclose(noise_matrix(after) @ step, noise_matrix(now), atol=1e-12)


def test_shares_of_named_noises():
    for bias, at_zero in ((-1000.0, 0.0), (-2.0, 0.1192), (0.0, 0.5), (2.0, 0.8808), (1000.0, 1.0)):
        assert HybridNoise(bias).uniform_share(0.0) == pytest.approx(at_zero, abs=1e-4)
    # At t = 1/2: c = p_u / (1 - p_u) and noise t m + c u.
    log_snr = math.log(0.5 / (0.5 + 0.25))
    assert HybridNoise(uniform_probability=0.2).uniform_share(log_snr) == pytest.approx(1 / 3)
    assert HybridNoise(uniform_probability=0.0).uniform_share(1.0) == 0


def noisy_model(joint: torch.Tensor, level_of: dict, calls: list) -> Toy:
    """The law of every clean token given the other noisy one, at the level of the step."""
    texts = words(2)
    one_hot = torch.nn.functional.one_hot(texts, NUM_IDS + 1).double()

    def logits(tokens, real):
        level = level_of[len(calls)]
        calls.append(1)
        matrix = noise_matrix(level)
        # Given the other slot alone: what a slot shows itself enters by the sampler's formula.
        shown = matrix[texts].gather(2, tokens.T[None].expand(len(texts), -1, -1))  # [w, s, b]
        weight = torch.stack([joint[:, None] * shown[:, 1], joint[:, None] * shown[:, 0]], dim=1)
        laws = torch.einsum("wsb,wsv->bsv", weight, one_hot)
        return laws.log()

    return Toy(logits)


@each_noise
def test_many_ancestral_steps_have_the_joint_law(noise):
    """With the exact laws of every level, the optimum of the bound. Slots of one step are
    independent, hence many steps."""
    joint = random_joint(2)
    num_steps = 60
    levels = NoiseProcess(noise, MASK, NUM_IDS + 1).levels("cosine", num_steps)
    model = noisy_model(joint, dict(enumerate(levels)), [])
    samples = sample_hybrid(
        model,
        nothing(),
        mask_id=MASK,
        vocab_size=NUM_IDS + 1,
        noise=noise,
        num_tokens=2,
        decoding=HybridDecoding(num_steps=num_steps),
        seed=1,
    )
    seen = torch.bincount((samples.tokens * torch.tensor([3, 1])).sum(1), minlength=9) / ROWS
    assert float((seen - joint).abs().max()) < 0.012  # sampling error 0.004, steps about 0.005
    assert (samples.num_evaluations == num_steps).all()
    independent = torch.outer(*(joint.reshape(3, 3).sum(axis) for axis in (1, 0))).flatten()
    assert float((seen - independent).abs().max()) > 0.03


@each_noise
@pytest.mark.parametrize("num_steps", [1, 3])
def test_one_slot_has_the_law_of_the_reverse_process(noise, num_steps):
    """Enumerated step by step from q_s(y) q(z|y) / q_t(z), as the transition matrices give it."""
    law = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    process = NoiseProcess(noise, MASK, NUM_IDS + 1)
    levels = process.levels("linear", num_steps)
    clean = torch.cat([law, torch.zeros(1).double()])
    share = process.prior_share
    state = torch.tensor([share / NUM_IDS] * NUM_IDS + [1 - share], dtype=torch.float64)
    for now, after in itertools.pairwise(levels):
        ratio = now.clean / after.clean
        new = torch.tensor(
            [now.one_text_id - ratio * after.one_text_id] * NUM_IDS
            + [now.mask - ratio * after.mask],
            dtype=torch.float64,
        )
        forward = ratio * torch.eye(NUM_IDS + 1, dtype=torch.float64) + new  # [y, z]
        before = clean @ noise_matrix(after)  # q_s(y | model)
        both = before[:, None] * forward
        total = both.sum(0)
        backward = torch.where(total > 0, both / total.clamp(min=1e-300), 0.0)
        state = backward @ state
    model = Toy(lambda tokens, real: clean.log().expand(*tokens.shape, 4))
    samples = sample_hybrid(
        model,
        nothing(),
        mask_id=MASK,
        vocab_size=NUM_IDS + 1,
        noise=noise,
        num_tokens=1,
        decoding=HybridDecoding(num_steps=num_steps, schedule="linear"),
        seed=3,
    )
    assert float(state[MASK]) == pytest.approx(0, abs=1e-12)
    assert p_value(samples.tokens, state[:NUM_IDS]) > 1e-3


def test_steps_between_have_the_marginals_of_the_noise():
    """Watched halfway, the tokens of a slot are distributed as q_s of the model's law."""
    law = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    levels = NoiseProcess(BALANCED, MASK, NUM_IDS + 1).levels("cosine", 10)
    seen = []
    sample_hybrid(
        Toy(lambda tokens, real: law.log().expand(*tokens.shape, 4)),
        nothing(),
        mask_id=MASK,
        vocab_size=NUM_IDS + 1,
        noise=BALANCED,
        num_tokens=1,
        decoding=HybridDecoding(num_steps=10),
        watch=seen.append,
    )
    assert len(seen) == 10
    for level, tokens in zip(levels[1:], seen, strict=True):
        expected = law @ noise_matrix(level)
        found = torch.bincount(tokens[:, 0], minlength=4) / ROWS
        assert float((found - expected).abs().max()) < 0.015


def test_masks_only_is_masked_diffusion():
    """Revealed tokens stay, and so many steps rarely reveal two at once: the joint law."""
    joint = random_joint(3)
    samples = sample_hybrid(
        Toy(masked_model(joint, 3)),
        nothing(),
        mask_id=MASK,
        vocab_size=NUM_IDS + 1,
        noise=NOISES["masked"],
        num_tokens=3,
        decoding=HybridDecoding(num_steps=80),
        seed=4,
    ).tokens
    seen = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(1), minlength=27) / ROWS
    assert float((seen - joint).abs().max()) < 0.012


def test_steps_beyond_the_levels_of_training_cost_nothing():
    """The cosine schedule begins and ends outside; there the level stands still."""
    levels = NoiseProcess(BALANCED, MASK, NUM_IDS + 1).levels("cosine", 1000)
    num_equal = sum(now == after for now, after in itertools.pairwise(levels))
    assert 5 < num_equal < 20
    samples = sample_hybrid(
        Toy(lambda tokens, real: torch.zeros(*tokens.shape, NUM_IDS + 1)),
        torch.zeros(3, 0, dtype=torch.int64),
        mask_id=MASK,
        vocab_size=NUM_IDS + 1,
        noise=BALANCED,
        num_tokens=2,
        decoding=HybridDecoding(num_steps=1000),
    )
    assert (samples.num_evaluations == 1000 - num_equal).all()
