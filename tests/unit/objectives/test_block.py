"""Block diffusion: its limits, its bound by enumeration, and the law of its noise levels."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.block import BlockObjective, time_of_mask_rate
from megatron_dlm.objectives.masked import MaskedObjective
from megatron_dlm.objectives.schedules import build_schedule
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

NUM_IDS, MASK, VOCAB_SIZE = 3, 3, 4
SEED = 5
Function = Callable[[Tensor], Tensor]
"""Corrupted texts int64 [n, S] with a clean past -> logits of the slots [n, S, V]."""


def make_objective(block_size: int, batch_size: int = 8, **fields: object) -> BlockObjective:
    schedule = build_schedule(str(fields.pop("schedule", "linear")), 2.0)
    return BlockObjective(VOCAB_SIZE, MASK, schedule, batch_size, block_size, **fields)  # type: ignore[arg-type]


def make_batch(num_samples: int, seq_length: int, first_sample: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(first_sample + 1)
    tokens = torch.randint(0, NUM_IDS, (num_samples, seq_length + 1), generator=generator)
    sample_index = torch.arange(first_sample, first_sample + num_samples)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), sample_index)


def hash_model(tokens: Tensor) -> Tensor:
    """Logits that depend on every visible slot."""
    position = torch.arange(tokens.shape[1])
    state = ((tokens + 1) * (position * position + 3 * position + 1)).sum(1)
    ids = torch.arange(VOCAB_SIZE, dtype=torch.float64)
    angle = state[:, None, None] + 7 * position[:, None] + 3 * ids * (position[:, None] + 1)
    return 2 * torch.sin(angle)


def exact_model(joint: Tensor, num_slots: int) -> Function:
    """Every slot's law given the slots that are no masks, of a table over all texts."""
    texts = torch.tensor(list(itertools.product(range(NUM_IDS), repeat=num_slots)))
    one_hot = torch.nn.functional.one_hot(texts, VOCAB_SIZE).double()

    def logits(tokens: Tensor) -> Tensor:
        seen = tokens.shape[1]
        fits = (tokens[:, None] == texts[:, :seen]) | (tokens[:, None] == MASK)
        laws = torch.einsum("bw,wsv->bsv", fits.all(2) * joint, one_hot[:, :seen])
        return (laws / laws.sum(2, keepdim=True)).log()

    return logits


def logits_of(inputs: ModelInputs, block_size: int, function: Function) -> Tensor:
    """[b, 2S, V]: every corrupted block behind the clean ones; nothing for the clean half."""
    corrupted, clean = inputs.tokens.chunk(2, dim=1)
    length = clean.shape[1]
    found = torch.full((*inputs.tokens.shape, VOCAB_SIZE), torch.nan, dtype=torch.float64)
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        seen = torch.cat([clean[:, :start], corrupted[:, start:stop]], dim=1)
        found[:, start:stop] = function(seen)[:, start:stop]
    return found


def reference_bound(text: Tensor, block_size: int, function: Function) -> float:
    """Sum over blocks, over counts and over sets of (1 / n) * CE of the set, by enumeration."""
    total = 0.0
    for start in range(0, len(text), block_size):
        stop = min(start + block_size, len(text))
        size = stop - start
        for count in range(1, size + 1):
            sets = list(itertools.combinations(range(start, stop), count))
            for chosen in sets:
                seen = text[:stop].clone()
                seen[list(chosen)] = MASK
                laws = torch.log_softmax(function(seen[None])[0], dim=1)
                nll = -sum(float(laws[slot, text[slot]]) for slot in chosen)
                total += nll / count / len(sets)
    return total


def mean_bound(objective: BlockObjective, text: Tensor, function: Function, num_steps: int):
    """Mean and standard error of "nelbo" of one text, in nats of the whole text."""
    estimates = []
    count = objective.batch_size
    for step in range(num_steps):
        tokens = torch.cat([text, text[:1]]).expand(count, -1)
        index = torch.arange(step * count, (step + 1) * count)
        batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index)
        inputs = objective.prepare(batch, SEED, Stream.TRAINING)
        logits = logits_of(inputs, objective.block_size, function)
        terms = micro_batch_loss(objective, logits[inputs.scored], inputs, None)
        total, num_valid = terms.metrics["nelbo"]
        assert num_valid == count * len(text)
        estimates.append(total.item() / count)
    return np.mean(estimates), np.std(estimates, ddof=1) / math.sqrt(num_steps)


def fields_of(inputs: ModelInputs) -> dict[str, Tensor]:
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}


def test_the_two_halves() -> None:
    batch = make_batch(6, 10)
    batch.valid[1, 4:] = False
    batch.valid[2] = False
    objective = make_objective(4, 6)
    assert objective.model_length(10) == 20
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    for name, value in fields_of(inputs).items():
        assert value.shape == (6, 20), name
    clean = {name: value[:, 10:] for name, value in fields_of(inputs).items()}
    assert torch.equal(clean["tokens"], batch.tokens[:, :10])
    for name in ("weights", "elbo_weights", "counted", "valid", "noise_level"):
        assert not clean[name].any(), name
    assert torch.equal(inputs.position_ids, torch.arange(10).repeat(2).expand(6, -1))
    assert torch.equal(inputs.targets[:, :10], batch.tokens[:, :10])
    assert torch.equal(inputs.valid[:, :10], batch.valid[:, :10])
    changed = inputs.tokens[:, :10] != batch.tokens[:, :10]
    assert torch.equal(changed, inputs.scored[:, :10])
    assert (inputs.tokens[:, :10][changed] == MASK).all()
    assert not (changed & ~batch.valid[:, :10]).any()
    assert changed[0].any()


@pytest.mark.parametrize("time_sampling", ["stratified", "iid"])
@pytest.mark.parametrize("weighting", ["elbo", "count", "unweighted"])
def test_one_block_is_the_masked_objective(weighting: str, time_sampling: str) -> None:
    """The same draws give the same numbers, bit for bit."""
    batch = make_batch(8, 12, first_sample=16)
    batch.valid[3, 7:] = False
    schedule = build_schedule("cosine" if weighting == "elbo" else "linear", 2.0)
    arguments = {"weighting": weighting, "time_sampling": time_sampling}
    masked = MaskedObjective(VOCAB_SIZE, MASK, schedule, 8, **arguments)  # type: ignore[arg-type]
    block = BlockObjective(VOCAB_SIZE, MASK, schedule, 8, 12, **arguments)  # type: ignore[arg-type]
    expected = masked.prepare(batch, SEED, Stream.TRAINING)
    found = block.prepare(batch, SEED, Stream.TRAINING)
    for name, value in fields_of(expected).items():
        assert torch.equal(getattr(found, name)[:, :12], value), name
    logits = torch.randn(int(expected.scored.sum()), VOCAB_SIZE)
    one, other = (
        micro_batch_loss(objective, logits, inputs, None)
        for objective, inputs in ((masked, expected), (block, found))
    )
    assert torch.equal(one.loss_sum, other.loss_sum)
    assert torch.equal(one.token_count, other.token_count)
    for name, pair in one.metrics.items():
        assert torch.equal(torch.stack(pair), torch.stack(other.metrics[name])), name
    longer = make_objective(50, weighting=weighting, time_sampling=time_sampling)
    assert torch.equal(
        longer.prepare(batch, SEED, Stream.TRAINING).tokens,
        make_objective(12, weighting=weighting, time_sampling=time_sampling)
        .prepare(batch, SEED, Stream.TRAINING)
        .tokens,
    )


def test_blocks_of_one_token_are_autoregression_without_noise() -> None:
    """Every block of one counted mask is that mask: the chain rule, in every draw."""
    joint = torch.rand(27, generator=torch.Generator().manual_seed(1)).double()
    joint = joint / joint.sum()
    function = exact_model(joint, 3)
    objective = make_objective(1, weighting="count")
    for number, text in enumerate(itertools.product(range(NUM_IDS), repeat=3)):
        mean, error = mean_bound(objective, torch.tensor(text), function, num_steps=2)
        assert mean == pytest.approx(-math.log(joint[number]), rel=1e-6)
        assert error < 1e-6
    inputs = objective.prepare(make_batch(8, 9), SEED, Stream.TRAINING)
    assert (inputs.tokens[:, :9] == MASK).all()
    assert (inputs.weights[:, :9] == 1).all()


@pytest.mark.parametrize("weighting", ["elbo", "count"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_the_bound_is_that_of_enumeration(block_size: int, weighting: str) -> None:
    """Also with a short last block: five tokens in blocks of two or three."""
    text = torch.tensor([0, 2, 1, 1, 0])
    exact = reference_bound(text, block_size, hash_model)
    objective = make_objective(block_size, 512, weighting=weighting)
    mean, error = mean_bound(objective, text, hash_model, num_steps=60)
    assert error < (0.12 if weighting == "elbo" else 0.02)
    tolerance = 4 * error + (2e-3 * len(text) if weighting == "elbo" else 1e-6)
    assert abs(mean - exact) < tolerance, (mean, exact, error)


def test_with_exact_conditionals_every_block_size_reaches_the_likelihood() -> None:
    joint = torch.rand(81, generator=torch.Generator().manual_seed(2)).double().square()
    joint = joint / joint.sum()
    for number in (0, 17, 80):
        text = torch.tensor(list(itertools.product(range(NUM_IDS), repeat=4))[number])
        nll = -math.log(joint[number])
        for block_size in (1, 2, 3, 4):
            function = exact_model(joint, 4)
            assert reference_bound(text, block_size, function) == pytest.approx(nll, rel=1e-9)
            objective = make_objective(block_size, 256, weighting="count")
            mean, error = mean_bound(objective, text, function, num_steps=20)
            assert abs(mean - nll) < 4 * error + 1e-5


def test_a_model_that_contradicts_itself_pays_for_it() -> None:
    """Averaged over all texts under the left-to-right law of the model: bound > entropy."""
    texts = torch.tensor(list(itertools.product(range(NUM_IDS), repeat=3)))

    def text_only(tokens: Tensor) -> Tensor:
        logits = hash_model(tokens)
        logits[..., MASK] = -torch.inf
        return logits

    nll = torch.tensor([reference_bound(text, 1, text_only) for text in texts])
    law = torch.exp(-nll)
    assert float(law.sum()) == pytest.approx(1)
    entropy = float((law * nll).sum())
    for block_size in (2, 3):
        bounds = torch.tensor([reference_bound(text, block_size, text_only) for text in texts])
        assert float((law * bounds).sum()) > entropy + 0.01


@pytest.mark.parametrize(("batch_size", "num_blocks"), [(1, 5), (8, 3), (8, 4), (3, 7), (16, 16)])
def test_levels_are_stratified(batch_size: int, num_blocks: int) -> None:
    objective = make_objective(2, batch_size, time_floor=1e-9)
    for step in (0, 7):
        batch = make_batch(batch_size, 2 * num_blocks, first_sample=step * batch_size)
        level = objective.prepare(batch, SEED, Stream.TRAINING).noise_level[:, ::2].double()
        level = level[:, :num_blocks]
        every = np.floor(level.numpy() * batch_size * num_blocks + 1e-4).astype(int).flatten()
        assert sorted(every % (batch_size * num_blocks)) == list(range(batch_size * num_blocks))
        for column in level.T.numpy():
            places = np.floor((column - column.min()) * batch_size + 1e-4).astype(int)
            assert sorted(places) == list(range(batch_size))
        for row in level.sort(dim=1).values:
            gaps = torch.cat([row, row[:1] + 1]).diff()
            assert float((gaps - 1 / num_blocks).abs().max()) < 1 / batch_size + 1e-6


def test_levels_are_uniform_in_every_place() -> None:
    objective = make_objective(1, 4, time_floor=1e-9)
    batch = make_batch(4 * 800, 3)
    level = objective.prepare(batch, SEED, Stream.TRAINING).noise_level[:, :3]
    for sample, block in itertools.product(range(2), range(3)):
        draws = level[sample::4, block].numpy()
        assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_any_split_of_the_batch_gives_the_same_noise() -> None:
    objective, batch = make_objective(3, 8), make_batch(8, 10, first_sample=24)
    whole = fields_of(objective.prepare(batch, SEED, Stream.TRAINING))
    for rows in torch.randperm(8, generator=torch.Generator().manual_seed(3)).split(3):
        part = TokenBatch(batch.tokens[rows], batch.valid[rows], batch.sample_index[rows])
        for name, value in fields_of(objective.prepare(part, SEED, Stream.TRAINING)).items():
            assert torch.equal(value, whole[name][rows]), name
    for change in ((SEED + 1, Stream.TRAINING), (SEED, Stream.VALIDATION)):
        assert not torch.equal(objective.prepare(batch, *change).tokens, whole["tokens"])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_clipped_rates(schedule: str) -> None:
    """Levels stay between the rates, the trained weights stay, and no bound is reported."""
    objective = make_objective(
        16, 64, schedule=schedule, lowest_mask_rate=0.3, highest_mask_rate=0.8
    )
    assert time_of_mask_rate(objective.schedule, 0.3) == pytest.approx(
        {"linear": 0.3, "cosine": 2 / math.pi * math.asin(0.3), "polynomial": 0.3**0.5}[schedule]
    )
    batch = make_batch(64, 160)
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    level = inputs.noise_level[:, :160].double()
    rate = objective.schedule.mask_rate(level)
    assert 0.3 - 1e-6 < float(rate.min()) < 0.31
    assert 0.79 < float(rate.max()) < 0.8 + 1e-6
    scored = inputs.scored[:, :160]
    expected = objective.schedule.elbo_weight(level[scored])
    ratio = inputs.weights[:, :160][scored].double() / expected
    assert torch.allclose(ratio, ratio[0], rtol=1e-5)  # a constant factor: that of the floor
    assert float(ratio[0]) == pytest.approx(1, abs=2e-3)
    assert not inputs.elbo_weights.any()
    terms = micro_batch_loss(objective, torch.zeros(int(scored.sum()), VOCAB_SIZE), inputs, None)
    assert [float(part) for part in terms.metrics["nelbo"]] == [0, 0]
    assert float(terms.metrics["loss"][1]) == float(terms.metrics["masked_share"][1]) == 64 * 160


def test_clipped_counts() -> None:
    objective = make_objective(
        10, 50, weighting="count", lowest_mask_rate=0.3, highest_mask_rate=0.8
    )
    inputs = objective.prepare(make_batch(50, 40), SEED, Stream.TRAINING)
    counts = inputs.scored[:, :40].reshape(-1, 10).sum(1)
    assert torch.equal(counts.unique(), torch.arange(4, 9))
    assert torch.equal(torch.bincount(counts)[4:], torch.full((5,), 40))
