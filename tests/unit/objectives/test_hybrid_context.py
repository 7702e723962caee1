"""Hybrid corruption with clean context, levels of single tokens and empty tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hybrid_setting import LENGTH, MASK_ID, PAD_ID, VOCAB_SIZE, make_batch, make_objective, prepare
from scipy import stats
from torch import Tensor

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.hybrid import HybridObjective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream


def test_single_tokens_have_levels_of_their_own_in_a_share_of_the_samples() -> None:
    objective = make_objective(batch_size=8, independent_noise_share=0.3)
    batch = make_batch(2000, 24)
    inputs = prepare(objective, batch)
    is_own = inputs.noise_level.std(1) > 0
    assert abs(is_own.double().mean().item() - 0.3) < 4 * math.sqrt(0.21 / 2000)
    time = torch.sigmoid(-inputs.noise_level[is_own].double())
    draws = (time - 1 / (1 + math.exp(9))) / LENGTH
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    for left, right in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        z = np.corrcoef(left.flatten(), right.flatten())[0, 1] * math.sqrt(left.numel())
        assert abs(z) < 4
    plain = prepare(make_objective(batch_size=8), batch)
    assert torch.equal(inputs.noise_level[~is_own], plain.noise_level[~is_own])
    assert torch.equal(inputs.tokens[~is_own], plain.tokens[~is_own])


def context_of(objective: HybridObjective, batch: TokenBatch) -> Tensor:
    """The clean slots, found clean, unscored and blind to all others."""
    inputs = prepare(objective, batch)
    context = ~inputs.valid
    assert torch.equal(inputs.tokens[context], inputs.targets[context])
    assert torch.all(inputs.noise_level[context] == 9)
    assert not torch.any(inputs.scored & context)
    assert torch.equal(inputs.counted, inputs.valid)
    hidden = objective.attention_mask(batch, 5, Stream.TRAINING)
    assert hidden is not None
    assert torch.equal(hidden, (context[:, :, None] & ~context[:, None, :])[:, None])
    return context


def check_fractions(fractions: np.ndarray) -> None:
    """arccos(1 - 2 r) / pi has the distribution function (1 - cos(pi f)) / 2."""
    assert stats.kstest(fractions, lambda f: (1 - np.cos(np.pi * f)) / 2).pvalue > 1e-3


def test_prompts_are_clean_unscored_and_blind() -> None:
    objective = make_objective(batch_size=8, prompt_share=0.4)
    assert objective.attention is AttentionPattern.ARBITRARY
    context = context_of(objective, make_batch(3000, 200))
    length = context.sum(1)
    assert torch.equal(context, torch.arange(200) < length[:, None])
    assert length.max() < 200
    has_prompt = length > 0
    # A fraction below 1/200 leaves no token; the law gives that 6e-5 of the samples.
    assert abs(has_prompt.double().mean().item() - 0.4) < 4 * math.sqrt(0.24 / 3000)
    jitter = np.random.default_rng(0).random(int(has_prompt.sum()))
    check_fractions((length[has_prompt].numpy() + jitter) / 200)


def test_samples_to_be_filled_in_have_clean_islands() -> None:
    objective = make_objective(batch_size=8, prompt_share=0.25, infilling_share=0.5)
    context = context_of(objective, make_batch(2000, 300))
    length = context.sum(1)
    is_prefix = (context == (torch.arange(300) < length[:, None])).all(1) & (length > 0)
    is_island = ~is_prefix & (length > 0)
    for found, share in ((is_prefix, 0.25), (is_island, 0.5)):
        assert abs(found.double().mean().item() - share) < 4 * math.sqrt(share / 2000) + 0.01
    fraction = context[is_island].double().mean(1)
    spread = math.sqrt(fraction.var().item() / is_island.sum().item())
    assert abs(fraction.mean().item() - 0.5) < 4 * spread
    assert abs(context[is_island].double().mean(0) - 0.5).max().item() < 0.09


def test_the_noise_behind_a_prompt_is_that_of_the_same_sample_without() -> None:
    batch = make_batch(64, 50)
    with_prompt = prepare(make_objective(prompt_share=0.5), batch)
    without = prepare(make_objective(), batch)
    scored = with_prompt.valid
    for name in ("tokens", "weights", "noise_level"):
        assert torch.equal(getattr(with_prompt, name)[scored], getattr(without, name)[scored])


def test_nothing_is_hidden_without_context() -> None:
    objective = make_objective(independent_noise_share=1.0)
    assert objective.attention is AttentionPattern.BIDIRECTIONAL
    assert objective.attention_mask(make_batch(4, 8), 5, Stream.TRAINING) is None


def test_invalid_and_mask_tokens_stay_and_are_not_scored() -> None:
    batch = make_batch(64, 40)
    batch.valid[:, 7:13] = False
    batch.tokens[:, 20] = MASK_ID
    inputs = prepare(make_objective("uniform"), batch)
    expected = batch.valid[:, :-1].clone()
    expected[:, 20] = False
    assert torch.equal(inputs.valid, expected)
    assert torch.equal(inputs.scored, expected)
    assert torch.equal(inputs.tokens[~expected], batch.tokens[:, :-1][~expected])
    assert torch.all(torch.isfinite(inputs.weights))


def looped_empty_tokens(batch: TokenBatch, row: int, is_empty: list[bool]) -> tuple[list[int], ...]:
    """The text with pads, one slot after the other; documents keep their places."""
    length = batch.tokens.shape[1] - 1
    numbers = [0] * length if batch.document is None else batch.document[row, :-1].tolist()
    tokens, valid = [], []
    source = 0
    for slot in range(length):
        if slot > 0 and numbers[slot] != numbers[slot - 1]:
            source = slot
        tokens.append(PAD_ID if is_empty[slot] else int(batch.tokens[row, source]))
        valid.append(bool(batch.valid[row, source]))
        source += not is_empty[slot]
    return tokens, valid


@pytest.mark.parametrize("has_documents", [False, True])
def test_empty_tokens_move_the_text_back(has_documents: bool) -> None:
    objective = make_objective(batch_size=8, empty_token_share=0.5, pad_token_id=PAD_ID)
    batch = make_batch(32, 60)
    batch.tokens[batch.tokens == PAD_ID] = 0  # so that the inserted ones are seen
    batch.valid[3, 20:] = False
    if has_documents:
        ends = torch.rand(32, 61, generator=torch.Generator().manual_seed(1)) < 0.1
        batch = replace(batch, document=ends.cumsum(1))
    inputs = prepare(objective, batch)
    is_empty = inputs.targets == PAD_ID
    assert is_empty.any()
    for row in range(32):
        tokens, valid = looped_empty_tokens(batch, row, is_empty[row].tolist())
        assert inputs.targets[row].tolist() == tokens
        assert inputs.valid[row].tolist() == valid
    assert inputs.tokens.shape == (32, 60)
    without = prepare(make_objective(batch_size=8), batch)
    assert torch.equal(inputs.position_ids, without.position_ids)


def test_shares_of_empty_tokens_are_uniform() -> None:
    objective = make_objective(batch_size=8, empty_token_share=0.2, pad_token_id=PAD_ID)
    batch = make_batch(1500, 800)
    batch.tokens[batch.tokens == PAD_ID] = 0
    share = (prepare(objective, batch).targets == PAD_ID).double().mean(1)
    assert stats.kstest(share.numpy(), "uniform", args=(0, 0.2)).statistic < 0.05
    assert abs(share.mean().item() - 0.1) < 4 * 0.06 / math.sqrt(1500)


def test_validation_is_isotropic_and_without_augmentation() -> None:
    config = ObjectiveConfig(
        kind="hybrid",
        time_sampling="iid",
        weighting="surrogate",
        independent_noise_share=1.0,
        prompt_share=0.5,
        infilling_share=0.5,
        empty_token_share=0.5,
        pad_token_id=PAD_ID,
    )
    built = [
        build_objective(
            config, vocab_size=VOCAB_SIZE, mask_token_id=MASK_ID, batch_size=16, training=training
        )
        for training in (True, False)
    ]
    batch = make_batch(16, 64)
    given, plain = (objective.prepare(batch, 5, Stream.VALIDATION) for objective in built)
    assert not torch.equal(given.targets, batch.tokens[:, :-1])
    expected = make_objective(weighting="surrogate").prepare(batch, 5, Stream.VALIDATION)
    for name in ("tokens", "targets", "weights", "elbo_weights", "noise_level", "valid"):
        assert torch.equal(getattr(plain, name), getattr(expected, name)), name
    assert built[0].attention_mask(batch, 5, Stream.TRAINING) is not None
    assert built[1].attention_mask(batch, 5, Stream.VALIDATION) is None


@pytest.mark.parametrize(
    ("pad_token_id", "message"),
    [
        (None, "needs objective.pad_token_id; set it or use a tokenizer with a pad token"),
        (9, "objective.pad_token_id is 9; it must lie in"),
        (MASK_ID, "differ from objective.mask_token_id 4"),
    ],
)
def test_empty_tokens_need_an_id(pad_token_id: int | None, message: str) -> None:
    config = ObjectiveConfig(kind="hybrid", empty_token_share=0.1, pad_token_id=pad_token_id)
    with pytest.raises(ValueError, match=message):
        build_objective(
            config, vocab_size=VOCAB_SIZE, mask_token_id=MASK_ID, batch_size=1, training=False
        )
