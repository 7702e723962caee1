"""Boundaries of packed documents, and attention inside them against a dense mask in float64."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dlm.models.attention import ScaledDotProductAttention
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


def test_one_document_is_the_whole() -> None:
    packed = packed_sequences(DOCUMENT[2:], "cpu")
    assert packed.lengths == (8,)
    assert packed.cu_seqlens_q.tolist() == [0, 8]


def test_boundaries_lie_on_the_device_asked_for() -> None:
    packed = packed_sequences(DOCUMENT, "meta")
    assert packed.cu_seqlens_q.device.type == packed.cu_seqlens_kv.device.type == "meta"
    with pytest.raises(AssertionError, match="wait"):
        packed_sequences(DOCUMENT.to("meta"), "cpu")


def dense_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """query [t, heads, d], key and value [t, groups, d], visible bool [t, t] -> [t, heads * d]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(2)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_and_gradient_equal_a_dense_mask_in_float64(groups: int, is_causal: bool) -> None:
    heads, width, total = 4, 8, DOCUMENT.numel()
    mask_type = AttnMaskType.causal if is_causal else AttnMaskType.no_mask
    attention = ScaledDotProductAttention(
        config=TransformerConfig(
            num_layers=1, hidden_size=heads * width, num_attention_heads=heads
        ),
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
        attention_dropout=0.0,
    )
    # Numbers that no two documents share.
    unique = (DOCUMENT + 10 * torch.arange(len(DOCUMENT))[:, None]).flatten()
    visible = unique[:, None] == unique[None, :]
    if is_causal:
        visible = visible.tril()
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads, width), (total, groups, width), (total, groups, width)]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [part.detach().double().requires_grad_() for part in ours]

    output = attention(*ours, None, packed_seq_params=packed_sequences(DOCUMENT, "cpu"))
    wanted = dense_attention(*exact, visible)
    assert output.shape == (total, heads * width)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-6)

    factor = torch.randn(output.shape, generator=generator)
    (output * factor).sum().backward()
    (wanted * factor.double()).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=1e-5)
