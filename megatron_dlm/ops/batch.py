"""The two batches every part of training shares: clean text, and what an objective makes of it.

Shapes: b micro-batch, S full sequence, s length that the model sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Clean text; identical on every tensor-, pipeline- and context-parallel rank of a data rank.

    Autoregressive models score the S targets `tokens[:, 1:]`, diffusion models the first S tokens:
    both see the same windows.
    """

    tokens: Tensor
    """int64 [b, S+1], on the same device as the other fields."""
    valid: Tensor
    """bool [b, S+1]; False marks context or filler, which is never scored."""
    sample_index: Tensor
    """int64 [b], place in the global training order; never repeats, also not in later epochs."""
    document: Tensor | None = None
    """int64 [b, S+1], number of the document inside its row: 0, 1, 2 …, never falling.

    Filler behind the last document has a number of its own. Attention then stays inside a document
    and positions begin anew in each; None lets attention cross documents.
    """

    @cached_property
    def first_sample(self) -> int:
        """sample_index of the first row; a batch that has moved still knows it without waiting."""
        return int(self.sample_index[0])

    @property
    def input_document(self) -> Tensor | None:
        """int64 [b, S]: `document` of the tokens that models read, the first S."""
        return None if self.document is None else self.document[:, :-1]

    def crop(self, length: int) -> TokenBatch:
        """Keep the first `length` tokens of every sample and the one token after them."""
        assert 0 < length < self.tokens.shape[1], (length, tuple(self.tokens.shape))
        columns = length + 1
        return TokenBatch(
            tokens=self.tokens[:, :columns],
            valid=self.valid[:, :columns],
            sample_index=self.sample_index,
            document=None if self.document is None else self.document[:, :columns],
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """Move every field; copies from pinned memory do not wait."""
        document = self.document
        moved = TokenBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            sample_index=self.sample_index.to(device, non_blocking=True),
            document=None if document is None else document.to(device, non_blocking=True),
        )
        vars(moved)["first_sample"] = self.first_sample
        return moved


@dataclass(frozen=True)
class ModelInputs:
    """One corrupted micro-batch; every field is [b, s], so slicing is one loop over the fields."""

    tokens: Tensor
    """int64, what the model reads."""
    position_ids: Tensor
    """int64, 0 to s-1 in every row; from 0 again in every document where there are documents."""
    targets: Tensor
    """int64, the clean token that the slot has to predict."""
    weights: Tensor
    """fp32, factor of the slot in the trained loss; 0 where it is not scored."""
    elbo_weights: Tensor
    """fp32, factor of the slot in the true bound; 0 where it adds nothing."""
    counted: Tensor
    """bool, the slot counts in the denominator of the trained loss."""
    valid: Tensor
    """bool, the slot holds a valid clean target: the denominator of the true bound."""
    noise_level: Tensor
    """fp32, noise level t of the slot; 0 for autoregressive models."""

    @property
    def scored(self) -> Tensor:
        """bool [b, s]: the slots on which the output layer has to run."""
        return (self.weights != 0) | (self.elbo_weights != 0)

    def at(self, slots: Tensor | slice) -> ModelInputs:
        """Every field at these flat indices (int64 [n], or a slice) of [b, s]: fields [n]."""
        return self.map(lambda values: values.reshape(-1)[slots])

    def one_row(self) -> ModelInputs:
        """The rows behind one another: fields [1, b * s]."""
        return self.map(lambda values: values.reshape(1, -1))

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Every field changed in the same way."""
        return ModelInputs(
            **{field.name: change(getattr(self, field.name)) for field in fields(self)}
        )


def document_starts(document: Tensor) -> Tensor:
    """bool [b, s]: slots where a document begins; the first slot of every row does."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return starts
