"""Boundaries of packed documents, and attention inside them against a dense mask in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_reference import (
    ALONE,
    HEADS,
    WIDTH,
    check_gradients,
    draw,
    in_double,
    reference_attention,
    take_flexible_attention,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.models.attention import AttentionOptions, CoreAttention
from megatron_dlm.models.packed import packed_sequences

# Two rows whose last and first document carry the same number, and a document of one token.
DOCUMENT = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [2, 2, 3, 3, 3, 3, 3, 3], [0] * 8])


def test_boundaries() -> None:
    packed = packed_sequences(DOCUMENT, "cpu")
    assert packed.lengths == (3, 1, 4, 2, 6, 8)
    assert packed.qkv_format == "thd"
    for boundaries in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert boundaries.dtype == torch.int32
        assert boundaries.tolist() == [0, 3, 4, 8, 10, 16, 24]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 8
    assert type(packed.max_seqlen_q) is int


def test_numbers_of_documents() -> None:
    numbers = packed_sequences(DOCUMENT, "cpu").document_numbers
    assert numbers.tolist() == 3 * [0] + [1] + 4 * [2] + 2 * [3] + 6 * [4] + 8 * [5]


def test_positions_begin_anew_in_every_document() -> None:
    positions = packed_sequences(DOCUMENT, "cpu").positions
    assert positions.tolist() == [place for length in (3, 1, 4, 2, 6, 8) for place in range(length)]


def test_ranks_that_share_a_sequence_share_it_as_one() -> None:
    packed = packed_sequences(DOCUMENT, "cpu", context_size=2)
    assert packed.qkv_format == "sbhd"
    assert packed.lengths == (3, 1, 4, 2, 6, 8)


def test_one_document_is_the_whole() -> None:
    packed = packed_sequences(DOCUMENT[2:], "cpu")
    assert packed.lengths == (8,)
    assert packed.cu_seqlens_q.tolist() == [0, 8]


def test_boundaries_lie_on_the_device_asked_for() -> None:
    packed = packed_sequences(DOCUMENT, "meta")
    assert packed.cu_seqlens_q.device.type == packed.cu_seqlens_kv.device.type == "meta"
    with pytest.raises(AssertionError, match="wait"):
        packed_sequences(DOCUMENT.to("meta"), "cpu")


def core_attention(pattern: AttentionPattern, groups: int, **options: Any) -> CoreAttention:
    """With sinks, where asked for, that are not zero."""
    attention = CoreAttention(
        config=TransformerConfig(
            num_layers=1,
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            num_query_groups=groups,
            attention_dropout=0.0,
        ),
        options=AttentionOptions(pattern, **options),
        attention_type="self",
        pg_collection=ALONE,
    )
    with torch.no_grad():
        for sink, values in zip(attention.parameters(), draw(*2 * [(groups, WIDTH)]), strict=False):
            sink.copy_(values)
    return attention


@pytest.mark.parametrize(
    ("options", "flexible"),
    [({}, False), ({"soft_cap": 2.0, "has_sink": True}, False), ({"has_sink": True}, True)],
    ids=["plain", "options", "flexible"],
)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_and_gradient_equal_a_dense_mask_in_float64(
    groups: int,
    is_causal: bool,
    options: dict[str, Any],
    flexible: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flexible:
        take_flexible_attention(monkeypatch)
    pattern = AttentionPattern.CAUSAL if is_causal else AttentionPattern.BIDIRECTIONAL
    attention = core_attention(pattern, groups, **options)
    # Numbers that no two documents share.
    unique = (DOCUMENT + 10 * torch.arange(len(DOCUMENT))[:, None]).flatten()
    visible = unique[:, None] == unique[None, :]
    if is_causal:
        visible = visible.tril()
    keys = (DOCUMENT.numel(), groups, WIDTH)
    ours = draw((DOCUMENT.numel(), HEADS, WIDTH), keys, keys)
    sinks = list(attention.parameters())
    exact = in_double([*ours, *sinks])

    output = attention(*ours, None, packed_seq_params=packed_sequences(DOCUMENT, "cpu"))
    wanted = reference_attention(
        *(part.transpose(0, 1)[None] for part in exact[:3]),
        visible[None],
        soft_cap=options.get("soft_cap"),
        sink=(exact[3], exact[4]) if sinks else None,
    )
    wanted = wanted[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-6)
    check_gradients(output, wanted, [*ours, *sinks], exact)


@pytest.mark.parametrize("pattern", [AttentionPattern.ARBITRARY, AttentionPattern.BLOCK])
def test_other_patterns_know_no_documents(pattern: AttentionPattern) -> None:
    attention = core_attention(pattern, groups=2, block_size=2)
    same = torch.zeros(DOCUMENT.numel(), HEADS, WIDTH)
    with pytest.raises(AssertionError):
        attention(same, same, same, None, packed_seq_params=packed_sequences(DOCUMENT, "cpu"))
