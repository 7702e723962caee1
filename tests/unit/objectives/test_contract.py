"""What every objective owes the trainer, checked for every configuration of every kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixture_reference import Rows, values
from torch import Tensor

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.objectives.base import Objective, micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.hybrid import HybridObjective
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
    "curricula": ObjectiveConfig(time_curriculum_steps=9, attention_annealing_steps=9),
    "hybrid_masked": ObjectiveConfig(kind="hybrid", noise_type="masked"),
    "hybrid_balanced": ObjectiveConfig(kind="hybrid", weighting="surrogate", time_sampling="iid"),
    "hybrid_uniform": ObjectiveConfig(kind="hybrid", noise_type="uniform"),
    "hybrid_dynamic": ObjectiveConfig(
        kind="hybrid", noise_type="time", uniform_probability=0.2, weighting="dynamic"
    ),
    "hybrid_everything": ObjectiveConfig(
        kind="hybrid",
        independent_noise_share=0.5,
        prompt_share=0.3,
        infilling_share=0.3,
        empty_token_share=0.3,
        pad_token_id=0,
    ),
    "block": ObjectiveConfig(kind="block", block_size=5),
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


def full_logits(objective: Objective) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    length = objective.model_length(SEQ_LENGTH)
    return torch.randn(BATCH_SIZE, length, PADDED_VOCAB_SIZE, generator=generator) * 2


def exact_nats(objective: Objective, logits: Tensor, rows: ModelInputs) -> tuple[Tensor, ...]:
    """What the scored slots cost, float64: one cross entropy, or the two divergences of hybrid."""
    logits = logits[:, :VOCAB_SIZE]
    if not isinstance(objective, HybridObjective):
        return (-logits.log_softmax(1).gather(1, rows.targets[:, None]).squeeze(1),)
    level = rows.noise_level.double()
    share, _ = objective.path.mixing(level)
    ids = rows.tokens, rows.targets
    return values(logits, Rows(logits, *ids, level, share, VOCAB_SIZE, MASK_ID))


def test_fields(objective: Objective) -> None:
    batch = make_batch()
    inputs = objective.prepare(batch, SEED, Stream.TRAINING)
    length = objective.model_length(SEQ_LENGTH)
    for name, value in fields_of(inputs).items():
        assert value.shape == (BATCH_SIZE, length), name
        assert value.dtype == DTYPES[name], name
    assert objective.metric_names[:2] == ("loss", "nelbo")
    assert tuple(objective.counts(inputs)) == objective.metric_names
    start = 1 if objective.attention is AttentionPattern.CAUSAL else 0
    window = slice(start, start + SEQ_LENGTH)
    slots, targets = torch.arange(SEQ_LENGTH).expand(BATCH_SIZE, -1), batch.tokens[:, window]
    valid = batch.valid[:, window]
    if objective.attention is AttentionPattern.BLOCK:
        slots, targets = slots.repeat(1, 2), targets.repeat(1, 2)
        valid = torch.cat([valid, torch.zeros_like(valid)], dim=1)
    assert torch.equal(inputs.position_ids, slots)
    if not has_context_or_empty_tokens(objective):
        assert torch.equal(inputs.targets, targets)
        assert torch.equal(inputs.valid, valid)
    assert not torch.any(inputs.scored & ~inputs.valid)
    assert not torch.any(inputs.counted & ~inputs.valid)
    assert torch.all(inputs.weights >= 0)
    assert torch.all(inputs.elbo_weights >= 0)
    if start == 0:
        changed = inputs.tokens != inputs.targets
        assert torch.all(inputs.scored[changed])
        if not isinstance(objective, HybridObjective):
            assert torch.all(inputs.tokens[changed] == MASK_ID)


def has_context_or_empty_tokens(objective: Objective) -> bool:
    return isinstance(objective, HybridObjective) and objective.empty_token_share > 0


def test_attention_masks_are_pure_and_of_any_split(objective: Objective) -> None:
    batch = make_batch()
    mask = objective.attention_mask(batch, SEED, Stream.TRAINING)
    assert (mask is not None) == (objective.attention is AttentionPattern.ARBITRARY)
    if mask is None:
        return
    assert mask.dtype == torch.bool
    assert mask.shape in ((BATCH_SIZE, 1, 24, 24), (1, 1, 24, 24))
    assert not torch.any(mask.diagonal(dim1=2, dim2=3))
    for rows in (slice(0, 3), slice(3, 8)):
        part = objective.attention_mask(rows_of(batch, rows), SEED, Stream.TRAINING)
        assert part is not None
        assert torch.equal(part, mask[rows] if mask.shape[0] > 1 else mask)


def test_documents_restart_the_positions_and_change_nothing_else(objective: Objective) -> None:
    """The noise too is that of the slot in the row: two documents never share it."""
    if objective.attention is AttentionPattern.BLOCK or has_context_or_empty_tokens(objective):
        pytest.skip("refused by the configuration, or checked in test_hybrid_context.py")
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
    is_noisy = objective.attention is not AttentionPattern.CAUSAL or bool(
        (tokens != batch.tokens[:, :SEQ_LENGTH]).any()
    )
    assert all(torch.equal(tokens, other) != is_noisy for other in others)


def test_loss_and_gradient_equal_the_full_vocabulary_in_float64(objective: Objective) -> None:
    inputs = objective.prepare(make_batch(), SEED, Stream.TRAINING)
    logits = full_logits(objective)[inputs.scored]
    leaf = logits.clone().requires_grad_()
    terms = micro_batch_loss(objective, leaf, inputs, None)
    terms.loss_sum.backward()

    rows = inputs.at(inputs.scored.flatten().nonzero().flatten())
    exact = logits.double().requires_grad_()
    parts = exact_nats(objective, exact, rows)
    nats = torch.stack(parts).sum(0)
    exact_loss = (nats * rows.weights.double()).sum()
    exact_loss.backward()
    assert exact.grad is not None
    assert leaf.grad is not None

    assert terms.loss_sum.dtype == torch.float32
    assert terms.loss_sum.shape == ()
    assert terms.token_count.dtype == torch.int32
    assert terms.loss_sum.item() == pytest.approx(exact_loss.item(), rel=2e-6)
    assert terms.token_count.item() == inputs.counted.sum().item()
    scale = rows.weights.max().item() if isinstance(objective, HybridObjective) else 1.0
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6 * scale)

    num_valid, num_scored = inputs.valid.sum().item(), inputs.scored.sum().item()
    elbo = rows.elbo_weights.double()
    expected = {
        "loss": (exact_loss.item(), inputs.counted.sum().item()),
        "nelbo": ((nats * elbo).sum().item(), num_valid),
        "masked_share": (num_scored, num_valid),
        "masked_nll": (nats.sum().item(), num_scored),
        "kl": ((parts[0] * elbo).sum().item(), num_valid),
        "itakura_saito": ((parts[-1] * elbo).sum().item(), num_valid),
        "noised_share": ((rows.tokens != rows.targets).sum().item(), num_valid),
    }
    assert tuple(terms.metrics) == objective.metric_names
    for name, (total, count) in terms.metrics.items():
        assert not total.requires_grad
        assert total.dtype == count.dtype == torch.float32
        assert (total.item(), count.item()) == pytest.approx(expected[name], rel=2e-6), name


def test_losses_of_micro_batches_add_up(objective: Objective) -> None:
    batch, logits = make_batch(), full_logits(objective)

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
        micro_batch_loss(objective, full_logits(objective)[inputs.scored][1:], inputs, None)
