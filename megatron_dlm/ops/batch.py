"""The two batches every part of training shares: clean text, and what an objective makes of it.

Shapes: b micro-batch, S full sequence, s length that the model sees.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def crop(self, length: int) -> TokenBatch:
        """Keep the first `length` tokens of every sample and the one token after them."""
        assert 0 < length < self.tokens.shape[1], (length, tuple(self.tokens.shape))
        columns = length + 1
        return TokenBatch(self.tokens[:, :columns], self.valid[:, :columns], self.sample_index)

    def to(self, device: torch.device | str) -> TokenBatch:
        """Move every field; copies from pinned memory do not wait."""
        return TokenBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            sample_index=self.sample_index.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class ModelInputs:
    """One corrupted micro-batch; every field is [b, s], so slicing is one loop over the fields."""

    tokens: Tensor
    """int64, what the model reads."""
    position_ids: Tensor
    """int64, 0 to s-1 in every row."""
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
