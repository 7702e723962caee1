"""The loss by noise level: against loops over slots, and the parts against the whole."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.noise_profile import NoiseProfile, range_name
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

VOCAB_SIZE, MASK_ID, BATCH, LENGTH, SEED = 37, 36, 8, 24, 3

CONFIGS = {
    "linear": ObjectiveConfig(),
    "cosine": ObjectiveConfig(schedule="cosine"),
    "polynomial": ObjectiveConfig(schedule="polynomial", schedule_exponent=3.0),
    "count": ObjectiveConfig(weighting="count"),
    "unweighted": ObjectiveConfig(weighting="unweighted"),
    "block": ObjectiveConfig(kind="block", block_size=5),
    "block_count": ObjectiveConfig(kind="block", block_size=5, weighting="count"),
    "hybrid": ObjectiveConfig(kind="hybrid"),
    "hybrid_time": ObjectiveConfig(kind="hybrid", noise_type="time", uniform_probability=0.2),
}


def built(config: ObjectiveConfig, num_buckets: int):
    return build_objective(
        config,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=BATCH,
        training=False,
        num_noise_buckets=num_buckets,
    )


def some_batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, MASK_ID, (BATCH, LENGTH + 1), generator=generator)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, 9:] = False
    return TokenBatch(tokens, valid, torch.arange(BATCH))


def measure(objective):
    inputs = objective.prepare(some_batch(), SEED, Stream.VALIDATION)
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(int(inputs.scored.sum()), VOCAB_SIZE, generator=generator)
    return inputs, logits, micro_batch_loss(objective, logits, inputs, None)


def noised_share(config: ObjectiveConfig, level: float) -> float:
    """1 - alpha, written down once more."""
    if config.kind == "hybrid":
        return 1.0 / (1.0 + math.exp(level))
    if config.weighting == "count" or config.schedule == "linear":
        return level
    if config.schedule == "cosine":
        return math.sin(math.pi / 2 * level)
    return level**config.schedule_exponent


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_make_the_whole(name):
    objective = built(CONFIGS[name], 5)
    _, _, terms = measure(objective)
    kind = "nelbo" if CONFIGS[name].kind == "hybrid" else "nll"
    whole = terms.metrics["nelbo" if kind == "nelbo" else "masked_nll"]
    parts = [
        terms.metrics[f"{kind}_at_noise_{low / 5:.1f}-{(low + 1) / 5:.1f}"] for low in range(5)
    ]
    for place in (0, 1):  # sums and counts
        assert float(sum(part[place] for part in parts)) == pytest.approx(
            float(whole[place]), rel=1e-5
        )
    assert sum(float(count) > 0 for _, count in parts) >= 4
    assert set(terms.metrics) == set(objective.metric_names)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "hybrid" not in name])
def test_a_range_holds_the_slots_of_its_levels(name):
    config = CONFIGS[name]
    inputs, logits, terms = measure(built(config, 4))
    sums, counts = [0.0] * 4, [0] * 4
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    levels, targets = (values[inputs.scored] for values in (inputs.noise_level, inputs.targets))
    for row, level, target in zip(log_probs, levels.tolist(), targets.tolist(), strict=True):
        place = min(int(noised_share(config, level) * 4), 3)
        sums[place] -= float(row[target])
        counts[place] += 1
    for place, edges in enumerate(("0.0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1.0")):
        total, count = terms.metrics[f"nll_at_noise_{edges}"]
        assert int(count) == counts[place]
        assert float(total) == pytest.approx(sums[place], rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_else_changes(name):
    plain, profiled = built(CONFIGS[name], 0), built(CONFIGS[name], 10)
    assert not isinstance(plain, NoiseProfile)
    _, _, before = measure(plain)
    inputs, _, after = measure(profiled)
    assert torch.equal(before.loss_sum, after.loss_sum)
    assert torch.equal(before.token_count, after.token_count)
    assert all(before.metrics[key] == after.metrics[key] for key in plain.metric_names)
    assert profiled.attention is plain.attention
    assert profiled.model_length(LENGTH) == plain.model_length(LENGTH)
    assert inputs.tokens.shape[1] == plain.model_length(LENGTH)


def test_halves_add_up():
    """What the chunked output layer does."""
    objective = built(ObjectiveConfig(), 10)
    inputs, logits, whole = measure(objective)
    rows = inputs.at(inputs.scored.flatten().nonzero().flatten())
    halves = [
        objective.loss_sums(logits[place], rows.at(place), None)
        for place in (slice(0, 30), slice(30, None))
    ]
    for name in objective.metric_names:
        both = sum(float(half.metrics[name]) for half in halves)
        assert both == pytest.approx(float(whole.metrics[name][0]), rel=1e-5, abs=1e-6)


def test_autoregressive_models_have_no_levels():
    assert built(ObjectiveConfig(kind="autoregressive"), 10).metric_names == ("loss", "nelbo")


def test_names_have_the_digits_they_need():
    assert [range_name(0, 0.1), range_name(0.25, 0.5), range_name(1 / 3, 2 / 3)] == [
        "0.0-0.1",
        "0.25-0.5",
        "0.3333-0.6667",
    ]
