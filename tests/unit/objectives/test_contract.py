"""What every objective owes the trainer, checked for every configuration of every kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.objectives.base import Objective, micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

VOCAB_SIZE, PADDED_VOCAB_SIZE, MASK_ID = 37, 40, 36
BATCH_SIZE, SEQ_LENGTH = 8, 24
SEED = 11

CONFIGS = {
    "autoregressive": ObjectiveConfig(kind="autoregressive"),
    "autoregressive_masking": ObjectiveConfig(kind="autoregressive", input_masking_ratio=0.3),
    "elbo": ObjectiveConfig(),
    "elbo_iid": ObjectiveConfig(time_sampling="iid"),
    "elbo_cosine": ObjectiveConfig(schedule="cosine"),
    "elbo_polynomial": ObjectiveConfig(schedule="polynomial", schedule_exponent=3.0),
    "count": ObjectiveConfig(weighting="count"),
    "count_iid": ObjectiveConfig(weighting="count", time_sampling="iid"),
    "unweighted": ObjectiveConfig(weighting="unweighted"),
    "maskgit": ObjectiveConfig(weighting="maskgit"),
    "maskgit_cosine": ObjectiveConfig(weighting="maskgit", schedule="cosine"),
}
DTYPES = {
    "tokens": torch.int64,
    "position_ids": torch.int64,
    "targets": torch.int64,
    "weights": torch.float32,
    "elbo_weights": torch.float32,
    "counted": torch.bool,
    "valid": torch.bool,
    "noise_level": torch.float32,
}


@pytest.fixture(params=CONFIGS, name="objective")
def _objective(request: pytest.FixtureRequest) -> Objective:
    return build_objective(
        CONFIGS[request.param],
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=BATCH_SIZE,
        training=True,
    )


def make_batch(first_sample: int = 3 * BATCH_SIZE, num_samples: int = BATCH_SIZE) -> TokenBatch:
    """Random text; the last tokens of sample 1 and all of sample 2 are invalid."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, MASK_ID, (num_samples, SEQ_LENGTH + 1), generator=generator)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, 9:] = False
    valid[2] = False
    return TokenBatch(tokens, valid, torch.arange(first_sample, first_sample + num_samples))


def with_documents(batch: TokenBatch) -> TokenBatch:
    """Documents of 1, 2, 3 ... tokens, those of every second row in the other order."""
    lengths = torch.arange(1, SEQ_LENGTH + 2)
    numbers = torch.repeat_interleave(lengths - 1, lengths)[: SEQ_LENGTH + 1]
    document = torch.stack([numbers, numbers[-1] - numbers.flip(0)]).repeat(BATCH_SIZE // 2, 1)
    return dataclasses.replace(batch, document=document)


def rows_of(batch: TokenBatch, rows: Tensor | slice) -> TokenBatch:
    return TokenBatch(batch.tokens[rows], batch.valid[rows], batch.sample_index[rows])


def fields_of(inputs: ModelInputs) -> dict[str, Tensor]:
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}


def full_logits() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(BATCH_SIZE, SEQ_LENGTH, PADDED_VOCAB_SIZE, generator=generator) * 2


def test_fields(objective: Objective) -> None:
    batch = make_batch()
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    assert objective.model_length(SEQ_LENGTH) == SEQ_LENGTH
    for name, value in fields_of(inputs).items():
        assert value.shape == (BATCH_SIZE, SEQ_LENGTH), name
        assert value.dtype == DTYPES[name], name
    assert torch.equal(inputs.position_ids, torch.arange(SEQ_LENGTH).expand(BATCH_SIZE, -1))
    start = 1 if objective.attention is AttentionPattern.CAUSAL else 0
    window = slice(start, start + SEQ_LENGTH)
    assert torch.equal(inputs.targets, batch.tokens[:, window])
    assert torch.equal(inputs.valid, batch.valid[:, window])
    assert not torch.any(inputs.scored & ~inputs.valid)
    assert not torch.any(inputs.counted & ~inputs.valid)
    assert torch.all(inputs.weights >= 0)
    assert torch.all(inputs.elbo_weights >= 0)
    changed = inputs.tokens != batch.tokens[:, :SEQ_LENGTH]
    assert torch.all(inputs.tokens[changed] == MASK_ID)


def test_documents_restart_the_positions_and_change_nothing_else(objective: Objective) -> None:
    """The noise too is that of the slot in the row: two documents never share it."""
    batch = with_documents(make_batch())
    assert batch.document is not None
    before = batch.document.clone()
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    assert torch.equal(batch.document, before)
    without = fields_of(objective.prepare(make_batch(), SEED, Stream.TRAINING))
    for name in without.keys() - {"position_ids"}:
        assert torch.equal(getattr(inputs, name), without[name]), name
    assert inputs.position_ids.shape == (BATCH_SIZE, SEQ_LENGTH)
    assert inputs.position_ids.dtype == torch.int64
    documents = batch.document[:, :SEQ_LENGTH].tolist()
    for numbers, positions in zip(documents, inputs.position_ids.tolist(), strict=True):
        assert positions == [slot - numbers.index(number) for slot, number in enumerate(numbers)]


def test_prepare_is_pure(objective: Objective) -> None:
    batch = make_batch()
    before = [value.clone() for value in (batch.tokens, batch.valid, batch.sample_index)]
    first = fields_of(objective.prepare(batch, SEED, Stream.TRAINING))
    torch.manual_seed(0)
    second = fields_of(objective.prepare(batch, SEED, Stream.TRAINING))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    after = (batch.tokens, batch.valid, batch.sample_index)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_any_split_of_the_batch_gives_the_same_noise(
    objective: Objective, micro_batch_size: int
) -> None:
    batch = make_batch()
    whole = fields_of(objective.prepare(batch, SEED, Stream.TRAINING))
    order = torch.randperm(BATCH_SIZE, generator=torch.Generator().manual_seed(1))
    for rows in order.split(micro_batch_size):
        part = fields_of(objective.prepare(rows_of(batch, rows), SEED, Stream.TRAINING))
        for name, value in part.items():
            assert torch.equal(value, whole[name][rows]), name


def test_noise_depends_on_seed_stream_and_sample(objective: Objective) -> None:
    batch = make_batch()
    tokens = objective.prepare(batch, SEED, Stream.TRAINING).tokens
    later = TokenBatch(batch.tokens, batch.valid, batch.sample_index + BATCH_SIZE)
    others = [
        objective.prepare(batch, SEED + 1, Stream.TRAINING).tokens,
        objective.prepare(batch, SEED, Stream.VALIDATION).tokens,
        objective.prepare(later, SEED, Stream.TRAINING).tokens,
    ]
    is_noisy = bool((tokens != batch.tokens[:, :SEQ_LENGTH]).any())
    assert all(torch.equal(tokens, other) != is_noisy for other in others)


def test_loss_and_gradient_equal_the_full_vocabulary_in_float64(objective: Objective) -> None:
    inputs = objective.prepare(make_batch(), SEED, Stream.TRAINING)
    logits = full_logits()
    leaf = logits[inputs.scored].clone().requires_grad_()
    terms = micro_batch_loss(objective, leaf, inputs, None)
    terms.loss_sum.backward()

    exact = logits.double().requires_grad_()
    nll = -exact[..., :VOCAB_SIZE].log_softmax(2)
    nll = nll.gather(2, inputs.targets[..., None]).squeeze(2)
    exact_loss = (nll * inputs.weights.double()).sum()
    exact_loss.backward()
    assert exact.grad is not None
    assert leaf.grad is not None

    assert terms.loss_sum.dtype == torch.float32
    assert terms.loss_sum.shape == ()
    assert terms.token_count.dtype == torch.int32
    assert terms.loss_sum.item() == pytest.approx(exact_loss.item(), rel=1e-6)
    assert terms.token_count.item() == inputs.counted.sum().item()
    torch.testing.assert_close(leaf.grad.double(), exact.grad[inputs.scored], rtol=1e-5, atol=1e-6)
    assert torch.all(exact.grad[~inputs.scored] == 0)

    num_valid, num_scored = inputs.valid.sum().item(), inputs.scored.sum().item()
    expected = {
        "loss": (exact_loss.item(), inputs.counted.sum().item()),
        "nelbo": ((nll * inputs.elbo_weights.double()).sum().item(), num_valid),
        "masked_share": (num_scored, num_valid),
        "masked_nll": (nll[inputs.scored].sum().item(), num_scored),
    }
    assert tuple(terms.metrics) == objective.metric_names
    for name, (total, count) in terms.metrics.items():
        assert not total.requires_grad
        assert total.dtype == count.dtype == torch.float32
        assert (total.item(), count.item()) == pytest.approx(expected[name], rel=1e-6)


def test_losses_of_micro_batches_add_up(objective: Objective) -> None:
    batch, logits = make_batch(), full_logits()

    def terms(rows: slice) -> tuple[float, int]:
        inputs = objective.prepare(rows_of(batch, rows), SEED, Stream.TRAINING)
        result = micro_batch_loss(objective, logits[rows][inputs.scored], inputs, None)
        return result.loss_sum.item(), int(result.token_count)

    whole = terms(slice(0, BATCH_SIZE))
    parts = [terms(slice(start, start + 2)) for start in range(0, BATCH_SIZE, 2)]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-6)
    assert sum(part[1] for part in parts) == whole[1]


def test_a_batch_without_scored_slots(objective: Objective) -> None:
    batch = make_batch()
    batch = TokenBatch(batch.tokens, torch.zeros_like(batch.valid), batch.sample_index)
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(PADDED_VOCAB_SIZE, 4, requires_grad=True)
    terms = micro_batch_loss(objective, hidden @ weight.T, inputs, None)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0
    assert terms.token_count.item() == 0
    assert torch.all(torch.stack([torch.stack(pair) for pair in terms.metrics.values()]) == 0)
    assert weight.grad is not None
    assert torch.all(weight.grad == 0)


def test_logits_of_other_slots_are_refused(objective: Objective) -> None:
    inputs = objective.prepare(make_batch(), SEED, Stream.TRAINING)
    with pytest.raises(AssertionError, match="scored slots"):
        micro_batch_loss(objective, full_logits()[inputs.scored][1:], inputs, None)
