"""The loss of a diffusion objective by noise level: where on the way from noise to text it is lost.

A noise level is told by the probability 1 - alpha that a token there is noised, which means the
same for every schedule and every kind of noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import one_hot

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.objectives.base import LossSums, Objective
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream

ProfiledLoss = Literal["nll", "nelbo"]


class DiffusionObjective(Objective, Protocol):
    """An objective whose slots have noise levels."""

    @property
    def profiled(self) -> ProfiledLoss:
        """nll: -log p of the masked tokens; nelbo: the terms of the bound over the valid tokens."""

    def noised_probability(self, noise_level: Tensor) -> Tensor:
        """1 - alpha, in [0, 1], at the levels of `ModelInputs.noise_level`; any one shape."""


@dataclass(frozen=True)
class NoiseProfile:
    """An objective that also measures its loss in `num_buckets` equal ranges of the noise level.

    "nll_at_noise_0.2-0.3" is the mean -log p of the masked tokens whose samples (block: blocks)
    have 20 to 30 % masked: the entropy left in a token when the others tell that much. Models that
    were trained with any schedule or weighting can be compared by it.
    "nelbo_at_noise_…", where noise is more than masks, is the mean of the terms of the bound over
    the valid tokens at these levels.
    """

    objective: DiffusionObjective
    num_buckets: int

    @property
    def attention(self) -> AttentionPattern:
        return self.objective.attention

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.objective.metric_names, *self._names)

    def model_length(self, seq_length: int) -> int:
        return self.objective.model_length(seq_length)

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        return self.objective.step_length(step, seq_length=seq_length, multiple=multiple, seed=seed)

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        return self.objective.prepare(batch, seed, stream)

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor | None:
        return self.objective.attention_mask(batch, seed, stream)

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """Those of the objective, and one more for every range."""
        sums = self.objective.loss_sums(logits, rows, tp_group)
        assert sums.nats is not None, "every diffusion objective tells the loss of its slots"
        is_bound = self.objective.profiled == "nelbo"
        nats = sums.nats * rows.elbo_weights if is_bound else sums.nats
        ranges = self._sums_by_range(rows.noise_level, nats)
        return LossSums(sums.loss_sum, {**sums.metrics, **ranges}, sums.nats)

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        is_bound = self.objective.profiled == "nelbo"
        counted = inputs.valid if is_bound else inputs.scored
        ranges = self._sums_by_range(inputs.noise_level.flatten(), counted.flatten().float())
        return {**self.objective.counts(inputs), **ranges}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        edges = [place / self.num_buckets for place in range(self.num_buckets + 1)]
        return tuple(
            f"{self.objective.profiled}_at_noise_{range_name(low, high)}"
            for low, high in pairwise(edges)
        )

    def _sums_by_range(self, noise_level: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Name -> sum of values (fp32 [n]) over the slots in that range."""
        probability = self.objective.noised_probability(noise_level.double())
        # The last range holds its upper end: all noise.
        place = (probability * self.num_buckets).long().clamp(0, self.num_buckets - 1)
        # Not index_add_, whose order of additions changes from run to run on a GPU.
        sums = (one_hot(place, self.num_buckets) * values[:, None]).sum(dim=0)
        return dict(zip(self._names, sums.unbind(), strict=True))


def range_name(low: float, high: float) -> str:
    """0.2-0.3, with as many digits as the ends need."""
    return "-".join(f"{end:.4g}" if round(end, 1) != end else f"{end:.1f}" for end in (low, high))
