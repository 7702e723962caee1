"""The contract between an objective and the rest of the trainer.

An objective is a pure function of a batch in two halves: `prepare` runs on the first and on the
last pipeline stage and gives both the same answer, `loss_sums` runs on the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.ops.batch import ModelInputs, TokenBatch, document_starts
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.ops.vocab_parallel import log_prob


@dataclass(frozen=True)
class LossSums:
    """Sums over some scored slots; those of two halves add up to those of the whole."""

    loss_sum: Tensor
    """fp32 [], weighted nats; the only field with a gradient."""
    metrics: dict[str, Tensor]
    """Name -> fp32 [], detached; the keys are the objective's metric_names."""
    nats: Tensor | None = None
    """fp32 [n], detached: the unweighted loss of every slot, for the profile over noise levels."""


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
        """Keys of the metrics, known without a batch; "loss" and "nelbo" always."""

    def model_length(self, seq_length: int) -> int:
        """Slots the model sees for samples of seq_length tokens."""

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        """Tokens per sample in this step, a multiple of `multiple`; the same on every rank."""

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Corrupt a batch: a pure function, the same on every rank and for every slice."""

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor | None:
        """bool [b or 1, 1, s, s], True hides the key (last axis) from the query: Megatron's sense.

        None where nothing is hidden beyond the pattern; only ARBITRARY ones return a mask. Pure,
        and computed on every pipeline stage.
        """

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """logits [n, V/tp] of any n scored slots, and their inputs, fields [n]. See `log_prob`."""

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Denominators of the metrics, [] each; a metric with count 0 is left out of reports."""


def micro_batch_loss(
    objective: Objective, logits: Tensor, inputs: ModelInputs, tp_group: ProcessGroup | None
) -> LossTerms:
    """The whole loss from logits [n, V/tp]: the slots of inputs.scored, in row-major order."""
    rows = inputs.at(slots_of(inputs.scored, logits.shape[0]))
    return loss_terms(objective, objective.loss_sums(logits, rows, tp_group), inputs)


def loss_terms(objective: Objective, sums: LossSums, inputs: ModelInputs) -> LossTerms:
    """The sums over all scored slots of `inputs`, with what they are divided by."""
    counts = objective.counts(inputs)
    return LossTerms(
        loss_sum=sums.loss_sum,
        token_count=inputs.counted.sum(dtype=torch.int32),
        metrics={name: (value, counts[name]) for name, value in sums.metrics.items()},
    )


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


def target_nll(
    logits: Tensor, rows: ModelInputs, vocab_size: int, tp_group: ProcessGroup | None
) -> Tensor:
    """-log p(target) in nats, fp32 [n], of the rows of logits [n, V/tp]."""
    return -log_prob(logits, rows.targets, vocab_size=vocab_size, tp_group=tp_group)


def weighted_sums(nats: Tensor, rows: ModelInputs) -> LossSums:
    """Sums of nats (fp32 [n]) under the trained and under the true weights of its slots."""
    detached = nats.detach()
    loss_sum = (nats * rows.weights).sum()
    bound_sum = (detached * rows.elbo_weights).sum()
    return LossSums(loss_sum, {"loss": loss_sum.detach(), "nelbo": bound_sum}, detached)


def loss_and_bound_counts(inputs: ModelInputs) -> dict[str, Tensor]:
    """Counted slots for the trained loss, valid ones for the true bound; fp32 [] each."""
    return {
        "loss": inputs.counted.sum(dtype=torch.float32),
        "nelbo": inputs.valid.sum(dtype=torch.float32),
    }


def slots_like(tokens: Tensor) -> Tensor:
    """int64 [b, s]: 0 to s-1 in every row; what noise is keyed by, documents or not."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def positions(slots: Tensor, document: Tensor | None) -> Tensor:
    """int64 [b, s]: where every slot stands in its document, or in its row if there are none."""
    if document is None:
        return slots
    starts = torch.where(document_starts(document), slots, 0)
    return slots - starts.cummax(dim=1).values
