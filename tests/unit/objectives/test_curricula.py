"""Masked training that changes over its first steps: where times lie, and who sees later tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_bound import Enumeration, estimate, random_table, uniform_text

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.curricula import TimeCurriculum
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

MASK_ID, BATCH_SIZE, SEED = 8, 6, 3


def build(config: ObjectiveConfig, *, training: bool = True) -> Objective:
    return build_objective(
        config, vocab_size=9, mask_token_id=MASK_ID, batch_size=BATCH_SIZE, training=training
    )


def batch_of(step: int, seq_length: int = 12, rows: slice = slice(0, BATCH_SIZE)) -> TokenBatch:
    tokens = torch.arange(BATCH_SIZE * (seq_length + 1)).remainder(MASK_ID)
    tokens = tokens.reshape(BATCH_SIZE, seq_length + 1)[rows]
    index = torch.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)[rows]
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index)


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("width", [0.05, 0.2, 2.0])
def test_times_follow_the_truncated_gaussian(width: float, floor: float) -> None:
    """Against scipy's: the exact inverse distribution function, and the inverse density."""
    curriculum = TimeCurriculum(num_steps=10, width=width, floor=floor)
    draw = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1]
    for step in (0, 1, 5, 9):
        moved, factor = curriculum.at(draw, torch.full(draw.shape, step))
        mean = step / 10
        law = stats.truncnorm((floor - mean) / width, (1 - mean) / width, mean, width)
        time = (floor + (1 - floor) * moved).numpy()
        np.testing.assert_allclose(time, law.ppf(draw.numpy()), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(factor, 1 / (law.pdf(time) * (1 - floor)), rtol=1e-7)
    for step in (10, 11, 1000):
        moved, factor = curriculum.at(draw, torch.full(draw.shape, step))
        assert torch.equal(moved, draw)
        assert torch.all(factor == 1)


def test_extreme_draws_stay_inside() -> None:
    draw = torch.tensor([0.0, 1 - 2.0**-24], dtype=torch.float64)
    for step in (0, 1, 99):
        moved, factor = TimeCurriculum(100, 1e-3, 1e-3).at(draw, torch.full(draw.shape, step))
        assert torch.all((moved >= 0) & (moved < 1))
        assert torch.all(torch.isfinite(factor.float()))


@pytest.mark.parametrize("weighting", ["elbo", "count"])
def test_the_bound_is_unbiased_during_the_curriculum(weighting: str) -> None:
    """What is trained moves from clean to noisy; what is logged stays the bound."""
    exact = Enumeration(random_table(), uniform_text())
    config = ObjectiveConfig(
        weighting=weighting,  # type: ignore[arg-type]
        time_sampling="iid",
        time_curriculum_steps=400,
        time_curriculum_width=0.5,
    )
    found = estimate(config, exact.log_probs)
    expected = exact.count_form() if weighting == "count" else exact.bound_above(1e-3, "linear")
    found["nelbo"].agrees_with(expected, resolution=0.02)
    usual = {"elbo": 0.5, "count": 0.75}[weighting]
    assert found["masked_share"].mean < 0.95 * usual, "times around 0 to 0.37, not around 1/2"
    assert found["loss"].mean != found["nelbo"].mean


def test_the_trained_weight_is_that_of_the_time() -> None:
    config = ObjectiveConfig(time_curriculum_steps=4, time_floor=0.1)
    for step in range(6):
        inputs = build(config).prepare(batch_of(step), SEED, Stream.TRAINING)
        masked, time = inputs.tokens == MASK_ID, inputs.noise_level.double()
        weights = torch.where(masked, 1 / time, 0.0).float()
        torch.testing.assert_close(inputs.weights, weights)
        if step >= 4:
            torch.testing.assert_close(inputs.elbo_weights, weights)
        else:
            law = stats.truncnorm((0.1 - step / 4) / 0.2, (1 - step / 4) / 0.2, step / 4, 0.2)
            density = torch.from_numpy(law.pdf(time.numpy()))
            expected = torch.where(masked, 1 / time / density / 0.9, 0.0).float()
            torch.testing.assert_close(inputs.elbo_weights, expected, rtol=1e-4, atol=0)


def test_samples_after_the_curriculum_are_those_without() -> None:
    plain, curriculum = (build(ObjectiveConfig(time_curriculum_steps=k)) for k in (0, 5))
    for step in (4, 5, 6):
        ours, theirs = (
            objective.prepare(batch_of(step), SEED, Stream.TRAINING)
            for objective in (curriculum, plain)
        )
        assert torch.equal(ours.noise_level, theirs.noise_level) == (step >= 5)
        assert torch.equal(ours.tokens, theirs.tokens) == (step >= 5)
    validation = build(ObjectiveConfig(time_curriculum_steps=5), training=False)
    ours, theirs = (
        objective.prepare(batch_of(0), SEED, Stream.VALIDATION)
        for objective in (validation, build(ObjectiveConfig(), training=False))
    )
    assert torch.equal(ours.elbo_weights, theirs.elbo_weights)


def test_attention_opens_from_causal_to_bidirectional() -> None:
    objective = build(ObjectiveConfig(attention_annealing_steps=4))
    assert objective.attention is AttentionPattern.ARBITRARY
    later = torch.ones(60, 60).triu(1).bool()
    hidden = {}
    for step in range(4):
        mask = objective.attention_mask(batch_of(step, 60), SEED, Stream.TRAINING)
        assert mask is not None
        assert mask.shape == (1, 1, 60, 60)
        hidden[step] = mask[0, 0]
        assert not torch.any(mask[0, 0] & ~later)
        share = mask[0, 0][later].double().mean().item()
        expected = 1 - step / 4
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / 1770)
    assert torch.equal(hidden[0], later)
    assert torch.any(hidden[3] & ~hidden[2]), "a step's pairs are drawn anew"
    for step in (4, 5, 100):
        assert objective.attention_mask(batch_of(step, 60), SEED, Stream.TRAINING) is None


def test_all_samples_of_a_step_share_the_hidden_pairs() -> None:
    objective = build(ObjectiveConfig(attention_annealing_steps=4))
    masks = [
        objective.attention_mask(batch_of(2, 60, rows), seed, Stream.TRAINING)
        for rows, seed in ((slice(0, 1), SEED), (slice(3, 6), SEED), (slice(0, 1), SEED + 1))
    ]
    assert masks[0] is not None
    assert masks[1] is not None
    assert masks[2] is not None
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_validation_sees_everything() -> None:
    objective = build(ObjectiveConfig(attention_annealing_steps=4), training=False)
    assert objective.attention is AttentionPattern.BIDIRECTIONAL
    assert objective.attention_mask(batch_of(0), SEED, Stream.VALIDATION) is None
