"""Core attention against a slow reference in float64: every pattern, soft cap and sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_reference import (
    ALONE,
    HEADS,
    WIDTH,
    block_visible,
    check_gradients,
    draw,
    in_double,
    reference_attention,
    take_flexible_attention,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.models import dense_attention as dense_module
from megatron_dlm.models.attention import AttentionOptions, CoreAttention
from megatron_dlm.models.attention_visibility import BlockDiffusion, Causal, Documents, Hidden
from megatron_dlm.models.dense_attention import dense_attention
from megatron_dlm.models.flexible_attention import flexible_attention

BATCH, LENGTH = 2, 12
_random = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))
# Half of the keys hidden, and of another half in every sample; a query always sees itself.
MASK = (_random < 0.5) & ~torch.eye(LENGTH, dtype=torch.bool)
NUMBERS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3])
_everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
_same_document = NUMBERS[:, None] == NUMBERS[None, :]
RULES: dict[str, tuple[Any, Tensor]] = {
    "everything": (None, _everything),
    "causal": (Causal(), _everything.tril()),
    "mask": (Hidden(MASK), ~MASK[:, 0]),
    "one mask for all": (Hidden(MASK[:1]), ~MASK[0, 0]),
    "blocks": (BlockDiffusion(6, 3), block_visible(6, 3)),
    "uneven blocks": (BlockDiffusion(6, 4), block_visible(6, 4)),
    "blocks of one": (BlockDiffusion(6, 1), block_visible(6, 1)),
    "one block": (BlockDiffusion(6, 6), block_visible(6, 6)),
}
DOCUMENTS = {
    "documents": (Documents(NUMBERS, is_causal=False), _same_document),
    "causal documents": (Documents(NUMBERS, is_causal=True), _same_document.tril()),
}
OPTIONS = {
    "plain": (None, False),
    "soft cap": (2.0, False),
    "sink": (None, True),
    "soft cap and sink": (2.0, True),
}


def inputs(groups: int) -> list[Tensor]:
    """query, key, value, and a sink's key and value."""
    keys = (BATCH, groups, LENGTH, WIDTH)
    return draw((BATCH, HEADS, LENGTH, WIDTH), keys, keys, (groups, WIDTH), (groups, WIDTH))


def check_option(
    attend: Callable[..., Tensor],
    rule: Any,
    visible: Tensor,
    option: str,
    *,
    groups: int,
    places: Tensor | None = None,
) -> None:
    """Outputs and gradients of all inputs; places: of the queries that are there."""
    soft_cap, has_sink = OPTIONS[option]
    ours = inputs(groups) if has_sink else inputs(groups)[:3]
    visible = visible.expand(BATCH, -1, -1)
    if places is not None:
        ours[0] = ours[0].detach()[:, :, places].requires_grad_()
        visible = visible[:, places]
    exact = in_double(ours)
    sink, wanted_sink = ((part[3], part[4]) if has_sink else None for part in (ours, exact))
    output = attend(*ours[:3], rule, scale=WIDTH**-0.5, places=places, soft_cap=soft_cap, sink=sink)
    wanted = reference_attention(*exact[:3], visible, soft_cap=soft_cap, sink=wanted_sink)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-6)
    check_gradients(output, wanted, ours, exact)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_dense_attention(name: str, option: str, groups: int) -> None:
    check_option(dense_attention, *RULES[name], option, groups=groups)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *[("blocks", option) for option in OPTIONS],
        *[(name, "soft cap and sink") for name in (*RULES, *DOCUMENTS) if name != "blocks"],
    ],
)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flexible_attention(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules, scores and sink; only a GPU has its fast kernel, see tests/gpu."""
    take_flexible_attention(monkeypatch)
    rule, visible = {**RULES, **DOCUMENTS}[name]
    check_option(flexible_attention, rule, visible, option, groups=2)


SOME_SLOTS = torch.tensor([2, 3, 8, 9])  # of the second of three ranks that share the sequence


@pytest.mark.parametrize("option", ["plain", "soft cap and sink"])
@pytest.mark.parametrize("name", [*RULES, *DOCUMENTS])
def test_some_queries_of_a_sequence(name: str, option: str) -> None:
    rule, visible = {**RULES, **DOCUMENTS}[name]
    check_option(dense_attention, rule, visible, option, groups=2, places=SOME_SLOTS)


@pytest.mark.parametrize("name", ["everything", "causal", "mask", "uneven blocks", "documents"])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_some_queries_of_a_sequence_in_flexible_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_flexible_attention(monkeypatch)
    rule, visible = {**RULES, **DOCUMENTS}[name]
    option = "soft cap and sink"
    check_option(flexible_attention, rule, visible, option, groups=2, places=SOME_SLOTS)


@pytest.mark.parametrize("name", ["everything", "mask", "blocks"])
def test_chunks_of_queries_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, _ = RULES[name]
    whole, parts = inputs(groups=2), inputs(groups=2)
    outputs = []
    for given, limit in ((whole, 2**24), (parts, 5 * BATCH * HEADS * (LENGTH + 1))):
        monkeypatch.setattr(dense_module, "_LARGEST_SCORES", limit)
        sink = (given[3], given[4])
        output = dense_attention(*given[:3], rule, scale=0.3, soft_cap=3.0, sink=sink)
        output.square().sum().backward()
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_mask_is_known_by_its_memory() -> None:
    """So flex attention prepares it once for all layers, also when they are recomputed."""
    mask = MASK.clone()
    known = {Hidden(mask)}
    assert Hidden(mask.detach()) in known
    assert Hidden(mask.clone()) not in known
    assert Hidden(mask[:1]) not in known
    mask[0, 0, 0, 1] = True
    assert Hidden(mask) not in known


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_dropout_drops_weights_and_scales_the_others(soft_cap: float | None) -> None:
    """With unit vectors as values the output is the weights; the sink's value is zero."""
    query, key = (part.detach() for part in inputs(HEADS)[:2])
    value = torch.eye(LENGTH).expand(BATCH, HEADS, -1, -1)
    key, query = (torch.nn.functional.pad(part, (0, LENGTH - WIDTH)) for part in (key, query))
    sink = (torch.ones(HEADS, LENGTH), torch.zeros(HEADS, LENGTH))
    torch.manual_seed(5)
    whole, dropped = (
        dense_attention(
            query, key, value, None, scale=1.0, soft_cap=soft_cap, sink=sink, dropout=dropout
        )
        for dropout in (0.0, 0.25)
    )
    kept = dropped != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_soft_cap_bounds_scores() -> None:
    """Scores of +-1000 become +-30: weights of exp(30) to exp(-30), not of 1 to 0."""
    query = torch.ones(1, 1, 2, WIDTH)
    key = torch.stack([torch.full((WIDTH,), 125.0), torch.full((WIDTH,), -125.0)])[None, None]
    value = torch.tensor([[0.0] * WIDTH, [1.0] * WIDTH])[None, None]
    output = dense_attention(query, key, value, None, scale=1.0, soft_cap=30.0)
    wanted = 1 / (1 + torch.tensor(60.0, dtype=torch.float64).exp())
    assert float(output[0, 0, 0, 0]) == pytest.approx(float(wanted), rel=1e-4)


def core_attention(
    options: AttentionOptions, groups: int = 2, dropout: float = 0.0
) -> CoreAttention:
    """With sinks that are not zero."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=dropout,
    )
    attention = CoreAttention(
        config=config,
        options=options,
        attention_type="self",
        pg_collection=ALONE,
    )
    if options.has_sink:
        with torch.no_grad():
            for sink, values in zip(
                attention.parameters(), draw(*2 * [(groups, WIDTH)]), strict=True
            ):
                sink.copy_(values)
    return attention


def sequence_first(part: Tensor) -> Tensor:
    return part.permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("pattern", "mask", "visible"),
    [
        (AttentionPattern.CAUSAL, None, _everything.tril()),
        (AttentionPattern.BIDIRECTIONAL, None, _everything),
        (AttentionPattern.ARBITRARY, None, _everything),
        (AttentionPattern.ARBITRARY, MASK, ~MASK[:, 0]),
        (AttentionPattern.BLOCK, None, block_visible(6, 4)),
    ],
    ids=["causal", "bidirectional", "arbitrary", "arbitrary, masked", "block"],
)
@pytest.mark.parametrize("flexible", [False, True], ids=["dense", "flexible"])
def test_core_attention_knows_its_pattern(
    pattern: AttentionPattern,
    mask: Tensor | None,
    visible: Tensor,
    flexible: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flexible:
        take_flexible_attention(monkeypatch)
    options = AttentionOptions(pattern, block_size=4, soft_cap=3.0, has_sink=True)
    attention = core_attention(options)
    query, key, value = inputs(groups=2)[:3]
    output = attention(*map(sequence_first, (query, key, value)), mask)
    sink = (attention.sink_key.double(), attention.sink_value.double())
    wanted = reference_attention(
        *(part.double() for part in (query, key, value)),
        visible.expand(BATCH, -1, -1),
        soft_cap=3.0,
        sink=sink,
    )
    assert output.shape == (LENGTH, BATCH, HEADS * WIDTH)
    torch.testing.assert_close(
        output.double(), sequence_first(wanted).flatten(2), rtol=0, atol=2e-6
    )


def test_a_new_sink_is_zero() -> None:
    """Score 0 and value 0: the weights of the others sum to less than one."""
    attention = core_attention(AttentionOptions(AttentionPattern.BIDIRECTIONAL, has_sink=True))
    for sink in attention.parameters():
        assert sink.shape == (2, WIDTH)
        assert getattr(sink, "tensor_model_parallel")  # noqa: B009  counted on every TP rank
        torch.nn.init.zeros_(sink)
    same = torch.zeros(3, 1, HEADS, WIDTH)
    output = attention(same, same[:, :, :2], torch.ones(3, 1, 2, WIDTH), None)
    torch.testing.assert_close(output, torch.full_like(output, 3 / 4))


def test_masks_only_where_the_pattern_allows_them() -> None:
    query, key, value = map(sequence_first, inputs(groups=2)[:3])
    for pattern in (AttentionPattern.CAUSAL, AttentionPattern.BLOCK):
        with pytest.raises(AssertionError, match="fixed by the layer spec"):
            core_attention(AttentionOptions(pattern, block_size=2))(query, key, value, MASK)


def test_an_odd_length_has_no_two_halves() -> None:
    query, key, value = (part[1:] for part in map(sequence_first, inputs(groups=2)[:3]))
    with pytest.raises(AssertionError, match="noisy and a clean half"):
        core_attention(AttentionOptions(AttentionPattern.BLOCK, block_size=2))(
            query, key, value, None
        )
