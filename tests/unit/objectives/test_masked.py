"""The law of the corruption: who is masked, how often, at which times, and for which length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.masked import MaskedObjective
from megatron_dlm.objectives.schedules import build_schedule
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

MASK_ID, VOCAB_SIZE = 8, 9


def make_objective(batch_size: int, weighting: str = "elbo", **fields: object) -> MaskedObjective:
    schedule = build_schedule(str(fields.pop("schedule", "linear")), 2.0)
    return MaskedObjective(VOCAB_SIZE, MASK_ID, schedule, batch_size, weighting=weighting, **fields)  # type: ignore[arg-type]


def make_batch(num_samples: int, seq_length: int, first_sample: int = 0) -> TokenBatch:
    tokens = torch.arange(num_samples * (seq_length + 1)).remainder(MASK_ID)
    tokens = tokens.reshape(num_samples, seq_length + 1)
    sample_index = torch.arange(first_sample, first_sample + num_samples)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), sample_index)


def noise_draws(inputs: ModelInputs, time_floor: float) -> np.ndarray:
    """The uniform numbers behind the noise levels of the samples."""
    time = inputs.noise_level[:, 0].double().numpy()
    return (time - time_floor) / (1 - time_floor)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1536])
def test_times_are_stratified_over_the_global_batch(batch_size: int) -> None:
    objective = make_objective(batch_size)
    for step in (0, 1, 1000):
        batch = make_batch(batch_size, 4, first_sample=step * batch_size)
        draws = noise_draws(objective.prepare(batch, 5, Stream.TRAINING), objective.time_floor)
        strata = np.floor(draws * batch_size + 1e-4).astype(int)
        assert sorted(strata % batch_size) == list(range(batch_size))


def test_a_micro_batch_draws_the_times_of_its_place() -> None:
    objective = make_objective(12)
    whole = objective.prepare(make_batch(12, 4, 36), 5, Stream.TRAINING).noise_level[:, 0]
    steps = whole.diff() / (1 - objective.time_floor)
    torch.testing.assert_close(steps.remainder(1), torch.full((11,), 1 / 12), atol=1e-5, rtol=0)
    for start in range(0, 12, 3):
        part = objective.prepare(make_batch(3, 4, 36 + start), 5, Stream.TRAINING)
        assert torch.equal(part.noise_level[:, 0], whole[start : start + 3])


@pytest.mark.parametrize("time_sampling", ["stratified", "iid"])
def test_times_are_uniform(time_sampling: str) -> None:
    """Stratified: one draw per step is free; iid: all of them."""
    batch_size = 4
    objective = make_objective(batch_size, time_sampling=time_sampling, time_floor=0.1)
    batch = make_batch(4000, 2)
    draws = noise_draws(objective.prepare(batch, 9, Stream.TRAINING), 0.1)
    free = draws[::batch_size] if time_sampling == "stratified" else draws
    assert stats.kstest(free, "uniform").pvalue > 1e-3
    if time_sampling == "iid":
        z = np.corrcoef(draws[1:], draws[:-1])[0, 1] * np.sqrt(draws.size)
        assert abs(z) < 4


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_tokens_are_masked_with_the_rate_of_their_time(schedule: str) -> None:
    seq_length = 400
    objective = make_objective(1, schedule=schedule, time_sampling="iid")
    inputs = objective.prepare(make_batch(600, seq_length), 1, Stream.TRAINING)
    masked = (inputs.tokens == MASK_ID).double()
    time = inputs.noise_level[:, 0].double()
    rate = objective.schedule.mask_rate(time)
    z = (masked.mean(1) - rate) / (rate * (1 - rate) / seq_length).sqrt()
    assert abs(z.mean().item()) < 4 / 600**0.5
    assert z.var().item() == pytest.approx(1, abs=4 * (2 / 600) ** 0.5)
    # Position by position, so that no place is favoured.
    expected = rate.mean().item()
    spread = (rate * (1 - rate)).mean().item() + rate.var().item()
    assert (masked.mean(0) - expected).abs().max().item() < 4.5 * (spread / 600) ** 0.5


def test_elbo_weight_of_a_masked_token_is_one_over_t() -> None:
    objective = make_objective(16, time_floor=1e-3)
    inputs = objective.prepare(make_batch(16, 64), 1, Stream.TRAINING)
    masked = inputs.tokens == MASK_ID
    expected = torch.where(masked, 1 / inputs.noise_level, 0.0)
    torch.testing.assert_close(inputs.weights, expected, rtol=1e-6, atol=0)
    assert torch.equal(inputs.weights, inputs.elbo_weights)
    assert torch.equal(inputs.scored, masked)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_the_mean_weight_of_a_token_is_one_above_the_time_floor(schedule: str) -> None:
    """Whatever the schedule, so that a uniform predictor over V tokens scores ln V."""
    objective = make_objective(20_000, schedule=schedule, time_floor=0.2)
    inputs = objective.prepare(make_batch(20_000, 8), 1, Stream.TRAINING)
    weight = inputs.elbo_weights.double()
    total = weight.sum(1)
    standard_error = (total.std() / (20_000**0.5) / 8).item()
    assert abs(weight.mean().item() - 1) < 4 * standard_error


def test_surrogates_keep_the_weights_of_the_true_bound() -> None:
    batch = make_batch(16, 64)
    batch.valid[3, 10:] = False
    elbo = make_objective(16).prepare(batch, 1, Stream.TRAINING)
    for weighting in ("unweighted", "maskgit"):
        inputs = make_objective(16, weighting).prepare(batch, 1, Stream.TRAINING)
        masked = inputs.tokens == MASK_ID
        assert torch.equal(inputs.tokens, elbo.tokens)
        assert torch.equal(inputs.elbo_weights, elbo.elbo_weights)
        assert torch.equal(inputs.weights, masked.float())
        expected = masked if weighting == "maskgit" else batch.valid[:, :-1]
        assert torch.equal(inputs.counted, expected)


def test_count_form_masks_every_number_once_per_stratified_batch() -> None:
    seq_length = 16
    batch = make_batch(seq_length, seq_length)
    inputs = make_objective(seq_length, "count").prepare(batch, 2, Stream.TRAINING)
    num_masked = (inputs.tokens == MASK_ID).sum(1)
    assert sorted(num_masked.tolist()) == list(range(1, seq_length + 1))
    level = (num_masked / seq_length)[:, None]
    torch.testing.assert_close(inputs.noise_level, level.expand(-1, seq_length))
    expected = torch.where(inputs.tokens == MASK_ID, 1 / level, 0.0)
    torch.testing.assert_close(inputs.weights, expected)
    torch.testing.assert_close(inputs.weights.sum(1), torch.full((16,), float(seq_length)))


def test_count_form_counts_valid_tokens_only() -> None:
    batch = make_batch(300, 12)
    batch.valid[:, 0] = False
    batch.valid[:, 7:] = False
    batch.valid[0] = False
    inputs = make_objective(1, "count", time_sampling="iid").prepare(batch, 2, Stream.TRAINING)
    masked = inputs.tokens == MASK_ID
    assert not torch.any(masked & ~inputs.valid)
    num_masked = masked.sum(1)
    assert num_masked[0] == 0
    assert inputs.noise_level[0].abs().max() == 0
    assert set(num_masked[1:].tolist()) == {1, 2, 3, 4, 5, 6}
    torch.testing.assert_close(inputs.weights[1:].sum(1), torch.full((299,), 6.0))


def test_count_form_masks_every_subset_equally_often() -> None:
    batch = make_batch(30_000, 4)
    inputs = make_objective(4, "count").prepare(batch, 2, Stream.TRAINING)
    masked = inputs.tokens == MASK_ID
    codes = (masked.long() * torch.tensor([1, 2, 4, 8])).sum(1).numpy()
    for size in (1, 2, 3, 4):
        of_size = [code for code in range(16) if bin(code).count("1") == size]
        observed = [int((codes == code).sum()) for code in of_size]
        assert sum(observed) == 30_000 // 4
        assert len(of_size) == 1 or stats.chisquare(observed).pvalue > 1e-3


def test_masks_are_independent_of_the_noise_level_draw() -> None:
    """At a fixed rank of the time the mask noise is fresh: no sample repeats another's mask."""
    inputs = make_objective(8).prepare(make_batch(64, 128), 1, Stream.TRAINING)
    later = make_objective(8).prepare(make_batch(64, 128, 64), 1, Stream.TRAINING)
    share = ((inputs.tokens == MASK_ID) == (later.tokens == MASK_ID)).double().mean().item()
    assert 0.4 < share < 0.75


def test_variable_length() -> None:
    objective = make_objective(8, variable_length_probability=1.0)
    arguments = {"seq_length": 64, "seed": 3}
    lengths = [objective.step_length(k, multiple=1, **arguments) for k in range(4000)]
    assert lengths == [objective.step_length(k, multiple=1, **arguments) for k in range(4000)]
    assert stats.chisquare(np.bincount(lengths, minlength=65)[2:]).pvalue > 1e-3
    assert set(lengths) == set(range(2, 65))
    for step, length in enumerate(lengths[:500]):
        rounded = objective.step_length(step, multiple=16, **arguments)
        assert rounded == max(16, length // 16 * 16)
    other = [objective.step_length(k, multiple=1, seq_length=64, seed=4) for k in range(100)]
    assert other != lengths[:100]


def test_variable_length_happens_in_its_share_of_the_steps() -> None:
    objective = make_objective(8, variable_length_probability=0.2)
    lengths = [objective.step_length(k, seq_length=512, multiple=1, seed=3) for k in range(5000)]
    share = np.mean(np.array(lengths) != 512)
    assert abs(share - 0.2 * 510 / 511) < 4 * (0.2 * 0.8 / 5000) ** 0.5
    off = make_objective(8)
    assert {off.step_length(k, seq_length=512, multiple=8, seed=3) for k in range(500)} == {512}


def test_evaluation_leaves_out_what_only_training_wants() -> None:
    masked = ObjectiveConfig(variable_length_probability=1.0)
    causal = ObjectiveConfig(kind="autoregressive", input_masking_ratio=0.9)
    batch = make_batch(4, 32)
    for training in (True, False):
        arguments = {"vocab_size": 9, "mask_token_id": 8, "batch_size": 4, "training": training}
        objective = build_objective(masked, **arguments)
        lengths = {objective.step_length(k, seq_length=32, multiple=1, seed=0) for k in range(20)}
        assert (lengths == {32}) is not training
        tokens = build_objective(causal, **arguments).prepare(batch, 0, Stream.TRAINING).tokens
        assert torch.equal(tokens, batch.tokens[:, :-1]) is not training


@pytest.mark.parametrize(
    "config",
    [ObjectiveConfig(), ObjectiveConfig(kind="autoregressive", input_masking_ratio=0.1)],
)
def test_the_mask_id_must_be_a_row_of_the_vocabulary(config: ObjectiveConfig) -> None:
    for mask_token_id, message in ((None, "needs objective.mask_token_id"), (9, "is 9; it must")):
        with pytest.raises(ValueError, match=message):
            build_objective(
                config, vocab_size=9, mask_token_id=mask_token_id, batch_size=1, training=True
            )
    causal = ObjectiveConfig(kind="autoregressive")
    build_objective(causal, vocab_size=9, mask_token_id=None, batch_size=1, training=True)
