"""The contract between an objective and the rest of the trainer.

An objective is a pure function of a batch in two halves: `prepare` runs on the first and on the
last pipeline stage and gives both the same answer, `loss` runs on the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.config.architecture import AttentionPattern
from megatron_dlm.ops.batch import ModelInputs, TokenBatch, document_starts
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.ops.vocab_parallel import log_prob


@dataclass(frozen=True)
class LossTerms:
    """Sums over one micro-batch; whoever reduces them divides once, by the global counts."""

    loss_sum: Tensor
    """fp32 [], weighted nats of this rank's slots; the only field with a gradient."""
    token_count: Tensor
    """int32 [], counted slots: the denominator of the trained loss."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count), fp32 [] and detached; the keys are the objective's metric_names."""


class Objective(Protocol):
    """What every kind of language model training offers."""

    @property
    def attention(self) -> AttentionPattern:
        """Which keys a query may see."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Keys of LossTerms.metrics, known without a batch; "loss" and "nelbo" always."""

    def model_length(self, seq_length: int) -> int:
        """Slots the model sees for samples of seq_length tokens."""

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        """Tokens per sample in this step, a multiple of `multiple`; the same on every rank."""

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Corrupt a batch: a pure function, the same on every rank and for every slice."""

    def loss(self, logits: Tensor, inputs: ModelInputs, tp_group: ProcessGroup | None) -> LossTerms:
        """logits [n, V/tp]: the slots of inputs.scored, in row-major order. See `log_prob`."""


def slots_of(scored: Tensor, num_slots: int) -> Tensor:
    """Flat indices int64 [n] of the scored slots of [b, s], in order, given how many there are.

    Knowing n from the logits saves the device-to-host copy that boolean indexing waits for.
    """
    flat = scored.reshape(-1)
    if not scored.is_cuda:
        found = int(flat.sum())
        assert found == num_slots, f"{num_slots} rows of logits for {found} scored slots"
    place = torch.where(flat, flat.cumsum(0) - 1, num_slots)
    slots = torch.zeros(num_slots + 1, dtype=torch.int64, device=scored.device)
    slots.scatter_(0, place, torch.arange(flat.shape[0], device=scored.device))
    return slots[:num_slots]


def scored_nll(
    logits: Tensor, inputs: ModelInputs, vocab_size: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Flat indices int64 [n] of the scored slots, and -log p(target) in nats, fp32 [n]."""
    slots = slots_of(inputs.scored, logits.shape[0])
    targets = inputs.targets.reshape(-1)[slots]
    return slots, -log_prob(logits, targets, vocab_size=vocab_size, tp_group=tp_group)


def weighted_terms(nll: Tensor, slots: Tensor, inputs: ModelInputs) -> LossTerms:
    """Sums of nll (nats, fp32 [n]) under the trained and the true weights of its slots [n]."""
    loss_sum = (nll * inputs.weights.reshape(-1)[slots]).sum()
    bound_sum = (nll.detach() * inputs.elbo_weights.reshape(-1)[slots]).sum()
    token_count = inputs.counted.sum(dtype=torch.int32)
    metrics = {
        "loss": (loss_sum.detach(), token_count.to(torch.float32)),
        "nelbo": (bound_sum, inputs.valid.sum(dtype=torch.float32)),
    }
    return LossTerms(loss_sum=loss_sum, token_count=token_count, metrics=metrics)


def slots_like(tokens: Tensor) -> Tensor:
    """int64 [b, s]: 0 to s-1 in every row; what noise is keyed by, documents or not."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def positions(slots: Tensor, document: Tensor | None) -> Tensor:
    """int64 [b, s]: where every slot stands in its document, or in its row if there are none."""
    if document is None:
        return slots
    starts = torch.where(document_starts(document), slots, 0)
    return slots - starts.cummax(dim=1).values
