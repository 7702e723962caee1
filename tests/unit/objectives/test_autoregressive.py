"""The shift, the exact likelihood, and input masking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from megatron_dlm.objectives.autoregressive import AutoregressiveObjective
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

MASK_ID = 50


def make_batch(num_samples: int, seq_length: int) -> TokenBatch:
    tokens = torch.randint(
        0, MASK_ID, (num_samples, seq_length + 1), generator=torch.Generator().manual_seed(0)
    )
    valid = torch.ones_like(tokens, dtype=torch.bool)
    return TokenBatch(tokens, valid, torch.arange(num_samples))


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    batch = make_batch(3, 10)
    batch.valid[0, :4] = False
    inputs = AutoregressiveObjective(51).prepare(batch, 0, Stream.TRAINING)
    assert torch.equal(inputs.tokens, batch.tokens[:, :-1])
    logits = torch.randn(3, 10, 51, generator=torch.Generator().manual_seed(1))
    terms = micro_batch_loss(AutoregressiveObjective(51), logits[inputs.scored], inputs, None)
    labels = batch.tokens[:, 1:].clone()
    labels[0, :3] = -100
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    mean = terms.loss_sum / terms.token_count
    assert terms.token_count.item() == 27  # the target of slot 3 is the first valid token
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.metrics["nelbo"] == terms.metrics["loss"]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_input_masking_ratio_is_kept_at_every_position(ratio: float) -> None:
    batch = make_batch(2000, 16)
    objective = AutoregressiveObjective(51, input_masking_ratio=ratio, mask_token_id=MASK_ID)
    inputs = objective.prepare(batch, 3, Stream.TRAINING)
    share = (inputs.tokens == MASK_ID).double().mean(0)
    standard_error = (ratio * (1 - ratio) / 2000) ** 0.5
    assert torch.all((share - ratio).abs() < 4.5 * standard_error)
    assert torch.equal(inputs.targets, batch.tokens[:, 1:])
    assert torch.all(inputs.weights == 1)


def test_a_larger_ratio_masks_more_of_the_same_tokens() -> None:
    batch = make_batch(20, 30)
    masked = [
        AutoregressiveObjective(51, ratio, MASK_ID).prepare(batch, 3, Stream.TRAINING).tokens
        == MASK_ID
        for ratio in (0.2, 0.6)
    ]
    assert torch.all(masked[1][masked[0]])


def test_length_never_varies() -> None:
    objective = AutoregressiveObjective(51)
    lengths = {objective.step_length(k, seq_length=64, multiple=8, seed=0) for k in range(50)}
    assert lengths == {64}
