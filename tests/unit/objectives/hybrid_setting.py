"""Small hybrid objectives and texts for them."""

from __future__ import annotations

import math

import torch
from hybrid_law import PATHS

from megatron_dlm.objectives.hybrid import HybridObjective
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

VOCAB_SIZE, MASK_ID, PAD_ID = 9, 4, 2  # the mask in the middle: ids on both sides are text
TEXT_IDS = [token for token in range(VOCAB_SIZE) if token != MASK_ID]
LENGTH = 1 - 2 / (1 + math.exp(9))  # of the interval of alpha that training sees


def make_objective(
    name: str = "balanced", batch_size: int = 16, **fields: object
) -> HybridObjective:
    return HybridObjective(VOCAB_SIZE, MASK_ID, PATHS[name], batch_size, **fields)  # type: ignore[arg-type]


def make_batch(num_samples: int, seq_length: int, first_sample: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(first_sample)
    draws = torch.randint(0, len(TEXT_IDS), (num_samples, seq_length + 1), generator=generator)
    tokens = torch.tensor(TEXT_IDS)[draws]
    index = torch.arange(first_sample, first_sample + num_samples)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index)


def prepare(objective: HybridObjective, batch: TokenBatch) -> ModelInputs:
    return objective.prepare(batch, 5, Stream.TRAINING)
