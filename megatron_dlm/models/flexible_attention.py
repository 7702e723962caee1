"""Attention on a GPU that skips what a pattern hides: PyTorch's flex attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from megatron_dlm.models.attention_visibility import Hidden, Visibility


def flexible_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Visibility | None,
    *,
    scale: float,
    places: Tensor | None = None,
    soft_cap: float | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `dense_attention`, without dropout; on the CPU only its forward pass exists.

    A sink never becomes a key, which would shift every tile by one slot: from the log-sum-exp of
    the other scores follows its weight, and how much it takes from them.
    """
    block_mask = None
    if rule is not None:
        block_mask = _block_mask(rule, places, key.shape[2], query.device)
    output, extra = _kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if soft_cap is None else _capping(soft_cap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if sink is not None else AuxRequest(),
    )
    if sink is None:
        return output
    repeats = query.shape[1] // key.shape[1]
    sink_key, sink_value = (part.float().repeat_interleave(repeats, dim=0) for part in sink)
    score = torch.einsum("bhsd,hd->bhs", query.float(), sink_key) * scale
    if soft_cap is not None:
        score = soft_cap * torch.tanh(score / soft_cap)
    weight = torch.sigmoid(score - extra.lse)[..., None]  # of the sink, among all
    mixed = output.float() * (1 - weight) + sink_value[None, :, None] * weight
    return mixed.to(query.dtype)


@lru_cache
def _kernel(is_compiled: bool) -> Callable[..., Any]:
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel) if is_compiled else kernel


@lru_cache  # one function per cap: a new one would be compiled anew
def _capping(soft_cap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return cap


@lru_cache(maxsize=4)  # a mask is built once for all layers, and again where another came between
def _block_mask(
    rule: Visibility, places: Tensor | None, num_keys: int, device: torch.device
) -> BlockMask:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule.visible(row, query if places is None else places[query], key)

    num_rows = len(rule.mask) if isinstance(rule, Hidden) else 1
    return create_block_mask(
        visible,
        B=num_rows if num_rows > 1 else None,
        H=None,
        Q_LEN=num_keys if places is None else len(places),
        KV_LEN=num_keys,
        device=device,
    )
