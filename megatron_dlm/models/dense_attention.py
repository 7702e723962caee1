"""Attention that computes every score: exact on every device, with any mask."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_dlm.models.attention_visibility import Causal, Visibility, visible_keys

_LARGEST_SCORES = 2**24
"""Scores that the explicit softmax holds at once; 64 MiB in fp32."""


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Visibility | None,
    *,
    scale: float,
    places: Tensor | None = None,
    soft_cap: float | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """query [b, heads, q, d], key and value [b, groups, k, d] -> [b, heads, q, d].

    rule: the keys each query sees; None is all. places: int64 [q], where the queries stand among
    the keys; None: there is one for every key. soft_cap: see `AttentionOptions`. sink: a key and a
    value, [groups, d] each, that every query sees too. dropout: of the attention weights.
    """
    # Its own causal path is the one that PyTorch computes without a mask.
    is_causal = isinstance(rule, Causal) and places is None and soft_cap is None and sink is None
    visible = None
    if rule is not None and not is_causal:
        visible = visible_keys(rule, places, key.shape[2], query.device)
    if sink is not None:
        key, value = (_with_sink(part, slot) for part, slot in zip((key, value), sink, strict=True))
        visible = None if visible is None else functional.pad(visible, (1, 0), value=True)
    if soft_cap is not None:
        capped = query * scale
        return _soft_capped(capped, key, value, visible, soft_cap=soft_cap, dropout=dropout)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _with_sink(part: Tensor, sink: Tensor) -> Tensor:
    """part [b, groups, s, d] and its sink [groups, d] -> [b, groups, 1 + s, d]."""
    return torch.cat([sink[None, :, None].expand(len(part), -1, -1, -1), part], dim=2)


def _soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    soft_cap: float,
    dropout: float,
) -> Tensor:
    """A softmax of our own in fp32; many queries go in chunks that the backward pass repeats.

    query [b, heads, s, d], already scaled; key, value [b, groups, k, d]; visible [b or 1, 1, s, k].
    """
    num_scores = query.shape[0] * query.shape[1] * key.shape[2]
    rows = max(1, _LARGEST_SCORES // num_scores)
    queries = query.split(rows, dim=2)
    masks = [None] * len(queries) if visible is None else visible.split(rows, dim=2)
    weigh = partial(_weigh, soft_cap=soft_cap, dropout=dropout)
    if len(queries) == 1:
        return weigh(query, key, value, visible)
    chunks = [
        checkpoint(weigh, part, key, value, mask, use_reentrant=False)
        for part, mask in zip(queries, masks, strict=True)
    ]
    return torch.cat(chunks, dim=2)


def _weigh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    soft_cap: float,
    dropout: float,
) -> Tensor:
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    # The queries of one group side by side: keys and values are never repeated.
    grouped = query.float().reshape(batch, groups, -1, size)
    scores = grouped @ key.float().transpose(2, 3)
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if visible is not None:
        scores = scores.view(batch, groups, heads // groups, length, -1)
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf).flatten(2, 3)
    weights = functional.dropout(scores.softmax(3), dropout)
    return (weights @ value.float()).view(query.shape).to(query.dtype)
