"""Next-token prediction, optionally from a partly masked input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.objectives.base import (
    LossSums,
    loss_and_bound_counts,
    positions,
    slots_like,
    target_nll,
    weighted_sums,
)
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Purpose, Stream, uniform


@dataclass(frozen=True)
class AutoregressiveObjective:
    """-log p(x_{i+1} | x_0..x_i) over the S targets `tokens[:, 1:]`, the mean over valid targets.

    With input masking (Super Data Learners, the ablation with ratios 0 to 0.9) every input token,
    the first one and context included, is replaced by the mask id with probability
    input_masking_ratio; the targets stay clean.

    With documents in the batch a slot sees its own document only. The last slot of a document still
    predicts the first token of the next, from the document that ends, unless `valid` leaves it out.
    """

    vocab_size: int
    input_masking_ratio: float = 0.0
    mask_token_id: int | None = None

    attention: ClassVar[AttentionPattern] = AttentionPattern.CAUSAL
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "nelbo")

    def model_length(self, seq_length: int) -> int:
        return seq_length

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        return seq_length

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Inputs are tokens 0..S-1, targets tokens 1..S; a slot is valid if its target is."""
        tokens, targets, valid = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.valid[:, 1:]
        slots = slots_like(tokens)
        if self.input_masking_ratio > 0:
            assert self.mask_token_id is not None, "build_objective asks for a mask id"
            draws = uniform(
                seed, stream, Purpose.INPUT_MASK, batch.sample_index[:, None], slots[:1]
            )
            tokens = torch.where(draws < self.input_masking_ratio, self.mask_token_id, tokens)
        weights = valid.to(torch.float32)
        return ModelInputs(
            tokens=tokens,
            position_ids=positions(slots, batch.input_document),
            targets=targets,
            weights=weights,
            elbo_weights=weights,
            counted=valid,
            valid=valid,
            noise_level=torch.zeros_like(weights),
        )

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> None:
        return None

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """Sum of -log p(target) over the valid slots; "nelbo" is the same number, the exact NLL."""
        return weighted_sums(target_nll(logits, rows, self.vocab_size, tp_group), rows)

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        return loss_and_bound_counts(inputs)
