"""Which row of an imported model is the mask, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.config.hf_commands import ImportConfig
from megatron_dlm.data.tokenization.tokenizer_adoption import adopt
from megatron_dlm.data.tokenization.tokenizer_source import TokenizerSource
from megatron_dlm.hf.configuration import Described
from megatron_dlm.hf.mapping import EMBEDDING, OUTPUT
from megatron_dlm.hf.safetensors_reader import SafetensorsDirectory

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class MaskPlan:
    """The mask of the run to come."""

    token_id: int | None
    """None where the run needs no mask."""
    vocab_size: int
    """Rows of the vocabulary, with the mask."""
    is_initialized: bool
    """Whether the row gets a new value."""
    num_text_rows: int
    """Rows that the mean is taken over."""
    origin: str
    """Where the row comes from, in words."""


def plan_mask(
    config: ImportConfig, described: Described, source: TokenizerSource | None, path: str
) -> MaskPlan:
    """Choose the row. Raises ValueError for a text token, or one that the tokenizer cannot name."""
    size = described.model.vocab_size
    assert size is not None
    num_text_rows = size if source is None else min(size, source.metadata.vocab_size)
    own_kind = described.objective.kind
    kind = own_kind if config.objective == "same" else config.objective
    if kind == "autoregressive":
        return MaskPlan(described.ids.mask, size, False, num_text_rows, "not needed")
    known = described.ids.mask
    if known is None and source is not None:
        known = source.metadata.mask_id
    token = known if config.mask_token_id is None else config.mask_token_id
    token = num_text_rows if token is None else token
    if token > size:
        raise ValueError(
            f"mask_token_id {token} is beyond the {size} rows of {path}; take {size}, the next one"
        )
    if source is not None:
        _check_against_tokenizer(token, source)
    was_mask = own_kind != "autoregressive" and token == described.ids.mask
    if token == size:
        origin = "a row was added"
    elif was_mask:
        origin = "the model's own"
    else:
        origin = "a row the model has"
    is_initialized = token == size or (config.mask_row == "mean" and not was_mask)
    if is_initialized:
        origin += f", initialised to the mean of {num_text_rows} rows"
    return MaskPlan(token, max(size, token + 1), is_initialized, num_text_rows, origin)


def with_mask(source: TokenizerSource, token: int, name: str) -> TokenizerSource:
    """The tokenizer that calls `token` its mask: it gets a new token, or a special one the role."""
    metadata = source.metadata
    if metadata.mask_id == token:
        return source
    if token == metadata.vocab_size:
        settings = TokenizerConfig(
            output_dir="unused", existing=source.origin, add_mask_token=True, mask_token=name
        )
        without = replace(source, metadata=replace(metadata, mask_id=None))
        return adopt(without, settings)
    return replace(source, metadata=replace(metadata, mask_id=token))


def mask_rows(plan: MaskPlan, weights: SafetensorsDirectory, *, is_tied: bool) -> dict[str, Tensor]:
    """Exported name -> the new row [1, h] of the mask; empty where nothing is initialised."""
    if not plan.is_initialized:
        return {}
    names = [EMBEDDING] if is_tied else [EMBEDDING, OUTPUT]
    return {name: _mean(weights, name, plan) for name in names}


def _mean(weights: SafetensorsDirectory, name: str, plan: MaskPlan) -> Tensor:
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for start in range(0, plan.num_text_rows, _BLOCK_ROWS):
        rows = weights.rows(name, start, min(_BLOCK_ROWS, plan.num_text_rows - start)).double()
        own = plan.token_id - start if plan.token_id is not None else -1
        if 0 <= own < len(rows):
            rows = torch.cat([rows[:own], rows[own + 1 :]])
        total, count = total + rows.sum(0, keepdim=True), count + len(rows)
    return total / count


def _check_against_tokenizer(token: int, source: TokenizerSource) -> None:
    metadata = source.metadata
    if token < metadata.vocab_size:
        if token not in metadata.special_ids:
            raise ValueError(
                f"mask_token_id {token} is a text token of the tokenizer {source.origin}; take one "
                f"of its special ids or {metadata.vocab_size}, its next free one"
            )
        if token in (metadata.eod_id, metadata.bos_id, metadata.pad_id):
            raise ValueError(
                f"mask_token_id {token} is the end, begin or pad token of the tokenizer "
                f"{source.origin}; take {metadata.vocab_size}, its next free one"
            )
    elif token > metadata.vocab_size:
        raise ValueError(
            f"mask_token_id {token} leaves a gap behind the {metadata.vocab_size} tokens of "
            f"{source.origin}; take {metadata.vocab_size}"
        )
