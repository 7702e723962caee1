"""Attention inside documents: every document of a window runs as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from opened import SEED, VOCAB_SIZE, opened_model
from rank_pool import RankPool
from tiny_run import made_up_documents, model_config
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig

NUM_ROWS, SEQ_LENGTH = 3, 24
MODELS = {
    "grouped queries, normalised": model_config(seq_length=SEQ_LENGTH),
    "a key per query": model_config(
        seq_length=SEQ_LENGTH, num_query_groups=4, qk_layernorm=False, activation="gelu"
    ),
    "soft cap, sink, full norm": model_config(
        seq_length=SEQ_LENGTH,
        attn_logit_softcapping=2.0,
        attention_sink=True,
        qk_layernorm_scope="full",
    ),
}
PATTERNS = [ObjectiveConfig(kind="autoregressive"), ObjectiveConfig(kind="masked")]


@dataclass(frozen=True)
class Outcome:
    """What one model gives for one batch."""

    logits: Tensor
    """fp32 [b * s, V], slot by slot."""
    gradients: dict[str, Tensor]
    """Of a fixed weighted sum of the logits."""


def make_batch(num_filler: int = 5) -> tuple[Tensor, Tensor]:
    """tokens and document, both int64 [b, s]; the last slots of row 1 are filler."""
    tokens = torch.randint(
        0, VOCAB_SIZE, (NUM_ROWS, SEQ_LENGTH), generator=torch.Generator().manual_seed(4)
    )
    document = made_up_documents(torch.arange(NUM_ROWS), SEQ_LENGTH)
    document[1, -num_filler:] = document[1, -num_filler - 1] + 1
    return tokens, document


def stretches(document: Tensor) -> list[tuple[int, slice]]:
    """(row, slots) of every document, found by looping over the slots."""
    found = []
    for row, numbers in enumerate(document.tolist()):
        edges = [k for k in range(1, len(numbers)) if numbers[k] != numbers[k - 1]]
        begins = [0, *edges]
        found += [(row, slice(*ends)) for ends in zip(begins, [*edges, len(numbers)], strict=True)]
    return found


def run_model(
    model: ModelConfig,
    objective: ObjectiveConfig,
    batch: tuple[Tensor, Tensor],
    how: str,
    *,
    device: str = "cpu",
    precision: str = "fp32",
) -> Outcome:
    """One rank. how: `packed` (all documents at once), `alone` (one by one) or `crossing`."""
    from megatron_dlm.models.packed import packed_sequences

    tokens, document = batch[0].to(device), batch[1]
    positions = torch.zeros_like(tokens)  # rotary embeddings do not read them
    with opened_model(
        ParallelConfig(), model, objective, precision=precision, device=device
    ) as opened:
        chunk = opened.chunk
        if how == "alone":
            places = [(slice(row, row + 1), slots) for row, slots in stretches(document)]
            logits = torch.cat([chunk(tokens[place], positions[place]) for place in places])
        else:
            packed = packed_sequences(document, device) if how == "packed" else None
            scored = torch.ones_like(tokens, dtype=torch.bool)
            logits = chunk(tokens, positions, scored=scored, packed=packed)
        logits = logits[:, :VOCAB_SIZE].float()
        factor = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
        (logits * factor.to(device)).sum().backward()
        gradients = {name: value.grad for name, value in chunk.named_parameters()}
    return Outcome(logits.detach(), gradients)


def outcomes(ranks: RankPool, model: str, pattern: ObjectiveConfig, *hows: str) -> list[Outcome]:
    arguments = (MODELS[model], pattern, make_batch())
    return [ranks.run(run_model, *arguments, how, num_ranks=1)[0] for how in hows]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.attention.value)
@pytest.mark.parametrize("model", MODELS)
def test_documents_run_as_if_alone(ranks: RankPool, model: str, pattern: ObjectiveConfig) -> None:
    packed, alone, crossing = outcomes(ranks, model, pattern, "packed", "alone", "crossing")
    assert packed.logits.shape == (NUM_ROWS * SEQ_LENGTH, VOCAB_SIZE)
    torch.testing.assert_close(packed.logits, alone.logits, rtol=0, atol=1e-5)
    for name, wanted in alone.gradients.items():
        scale = wanted.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            packed.gradients[name], wanted, rtol=0, atol=1e-5 * scale, msg=name
        )
    # What the check can see: without documents nearly every slot gets other logits.
    changed = (crossing.logits - packed.logits).abs().amax(1) > 1e-2
    assert changed.float().mean() > 0.7


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.attention.value)
def test_a_document_does_not_see_the_rest(ranks: RankPool, pattern: ObjectiveConfig) -> None:
    """Other text in one document, filler here, leaves every other slot as it was, bit for bit."""
    tokens, document = make_batch()
    edited = tokens.clone()
    filler = document == document[1, -1]
    filler[[0, 2]] = False
    edited[filler] = (edited[filler] + 1) % VOCAB_SIZE
    model = MODELS["a key per query"]
    before, after = (
        ranks.run(run_model, model, pattern, (given, document), "packed", num_ranks=1)[0].logits
        for given in (tokens, edited)
    )
    inside = filler.flatten()
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def draw_dropped_keys(lengths: tuple[int, ...], is_causal: bool) -> tuple[Tensor, ...]:
    """Attention weights [heads, t, t] in training, with the same seed again, and in evaluation."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dlm.config.objective import AttentionPattern
    from megatron_dlm.models.attention import AttentionOptions, CoreAttention
    from megatron_dlm.models.packed import PackedDocuments
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout

    heads, total = 4, sum(lengths)
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * total, num_attention_heads=heads, attention_dropout=0.25
    )
    # All scores are 0 and value k is the k-th unit vector: the output is the attention weights.
    same = torch.zeros(total, heads, total)
    units = torch.eye(total)[:, None].expand(total, heads, total)
    packed = PackedDocuments(qkv_format="thd", lengths=lengths)
    drawn = []
    pattern = AttentionPattern.CAUSAL if is_causal else AttentionPattern.BIDIRECTIONAL
    with laid_out(ParallelConfig()) as parallel:
        attention = CoreAttention(
            config=config,
            options=AttentionOptions(pattern),
            attention_type="self",
            pg_collection=parallel.groups,
        )
        for is_training in (True, True, False):
            seed_dropout(SEED, 0, parallel)
            attention.train(is_training)
            output = attention(same, same, units, None, packed_seq_params=packed)
            drawn.append(output.view(total, heads, total).transpose(0, 1))
    return tuple(drawn)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_dropout_of_packed_documents(ranks: RankPool, is_causal: bool) -> None:
    lengths = (20, 1, 20, 23)
    [drawn] = ranks.run(draw_dropped_keys, lengths, is_causal, num_ranks=1)
    dropped, again, kept = drawn
    blocks = [torch.ones(length, length) for length in lengths]
    visible = torch.block_diag(*(block.tril() if is_causal else block for block in blocks))
    weights = visible / visible.sum(1, keepdim=True)
    torch.testing.assert_close(kept, weights.expand_as(kept))
    assert torch.equal(dropped, again)
    is_dropped = (dropped == 0) & (visible > 0)
    wanted = torch.where(is_dropped, 0.0, weights / 0.75)
    torch.testing.assert_close(dropped, wanted)
    num_visible = visible.sum().item() * len(dropped)
    share = is_dropped.sum().item() / num_visible
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / num_visible) ** 0.5
    # Documents of one length draw masks of their own.
    assert not torch.equal(is_dropped[:, :20, :20], is_dropped[:, 21:41, 21:41])
