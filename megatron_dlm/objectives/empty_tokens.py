"""Empty-token augmentation: pad tokens in the text, which a model may leave out when it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.objectives.base import slots_like
from megatron_dlm.ops.batch import TokenBatch, document_starts
from megatron_dlm.ops.counter_rng import Purpose, Stream, uniform

_SHARE, _FIRST_SLOT = 0, 1  # positions of Purpose.EMPTY_TOKEN


def insert_empty_tokens(
    batch: TokenBatch, seed: int, stream: Stream, *, largest_share: float, pad: int
) -> tuple[Tensor, Tensor]:
    """(tokens int64, valid bool), both [b, S]: the text read by models, with pad tokens inserted.

    Every slot of a sample is a pad token with one probability, itself uniform in [0,
    largest_share). The text moves back and the end of what it belongs to is cut off: of the
    document if there are documents, so that their borders stay, else of the window. A pad token is
    valid where the text token that it moved back was.
    """
    text, valid = batch.tokens[:, :-1], batch.valid[:, :-1]
    slots, index = slots_like(text), batch.sample_index[:, None]
    share = uniform(seed, stream, Purpose.EMPTY_TOKEN, index, torch.full_like(index, _SHARE))
    draws = uniform(seed, stream, Purpose.EMPTY_TOKEN, index, slots[:1] + _FIRST_SLOT)
    is_empty = draws < share * largest_share
    num_before = is_empty.cumsum(dim=1) - is_empty.long()
    if batch.input_document is not None:
        starts = torch.where(document_starts(batch.input_document), slots, 0).cummax(dim=1).values
        num_before = num_before - num_before.gather(1, starts)
    source = slots - num_before
    return torch.where(is_empty, pad, text.gather(1, source)), valid.gather(1, source)
