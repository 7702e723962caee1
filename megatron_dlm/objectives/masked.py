"""Masked (absorbing) diffusion: predict the tokens that were replaced by the mask.

Slot i predicts token i, so the model sees exactly the S tokens it is scored on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
from megatron_dlm.objectives.curricula import TimeCurriculum, hidden_future
from megatron_dlm.objectives.draws import TimeSampling, level_draws
from megatron_dlm.objectives.noise_profile import ProfiledLoss
from megatron_dlm.objectives.schedules import Schedule
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import (
    Purpose,
    Stream,
    host_uniform,
    random_bits,
    to_uniform,
)

Weighting = Literal["elbo", "count", "unweighted", "maskgit"]


@dataclass(frozen=True)
class Corruption:
    """Which slots are masked and what the true bound weighs them; one noise level per sample."""

    masked: Tensor
    """bool [b, s]"""
    elbo_weight: Tensor
    """float64 [b, 1], weight of the cross entropy of a masked slot in the bound."""
    noise_level: Tensor
    """float64 [b, 1]: the time t, or n/l for the count form."""


@dataclass(frozen=True)
class MaskedObjective:
    """The bound, or a surrogate of it, from the cross entropies CE (nats) of the masked tokens.

    For a sample with l valid tokens at time t, `weighting` is

    elbo        1/l * sum of w(t) * CE, w = -alpha'/(1 - alpha): CE / t for the linear schedule.
    count       n uniform on 1..l, exactly n masked tokens, 1/l * sum of (l/n) * CE: the mean CE of
                the sample's masked tokens. The same bound (any-order autoregression) with less
                variance. Super Data Learners divide by the realised masked share, with an empty
                mask raised to n = 1, which counts n = 1 twice; here each n counts once.
    unweighted  1/l * sum of CE. Not a bound: a uniform predictor over V tokens gets (ln V) / 2.
    maskgit     sum of CE / number of masked tokens, both over the whole batch. Not a bound.

    All but maskgit average over valid tokens. "nelbo" logs the true bound whatever is trained.

    While a time curriculum lasts, the trained loss keeps these weights and looks at the drawn times
    only; "nelbo" is corrected for their law. It stays unbiased, but noisy: far from the mean of the
    curriculum a few samples stand for all.
    """

    vocab_size: int
    mask_token_id: int
    schedule: Schedule
    batch_size: int
    weighting: Weighting = "elbo"
    time_sampling: TimeSampling = "stratified"
    time_floor: float = 1e-3
    variable_length_probability: float = 0.0
    time_curriculum: TimeCurriculum | None = None
    attention_annealing_steps: int = 0

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "nelbo", "masked_share", "masked_nll")
    profiled: ClassVar[ProfiledLoss] = "nll"

    @property
    def attention(self) -> AttentionPattern:
        is_annealed = self.attention_annealing_steps > 0
        return AttentionPattern.ARBITRARY if is_annealed else AttentionPattern.BIDIRECTIONAL

    def model_length(self, seq_length: int) -> int:
        return seq_length

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        """seq_length, or in a share of the steps a random length of 2..seq_length, rounded down."""
        probability = self.variable_length_probability
        if host_uniform(seed, Stream.TRAINING, Purpose.LENGTH, step, 0) >= probability:
            return seq_length
        draw = host_uniform(seed, Stream.TRAINING, Purpose.LENGTH, step, 1)
        length = 2 + int(draw * (seq_length - 1))
        return min(seq_length, max(multiple, length - length % multiple))

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Mask the first S tokens; invalid slots stay as clean context and are never scored."""
        targets, valid = batch.tokens[:, :-1], batch.valid[:, :-1]
        slots = slots_like(targets)
        draw, factor = self._draw(batch.sample_index, seed, stream)
        bits = random_bits(seed, stream, Purpose.MASK, batch.sample_index[:, None], slots[:1])
        if self.weighting == "count":
            corruption = mask_by_count(draw, bits, valid)
        else:
            corruption = mask_by_time(draw, bits, valid, self.schedule, self.time_floor)
        masked = corruption.masked
        weights = torch.where(masked, corruption.elbo_weight, 0.0)
        is_bound = self.weighting in ("elbo", "count")
        return ModelInputs(
            tokens=torch.where(masked, self.mask_token_id, targets),
            position_ids=positions(slots, batch.input_document),
            targets=targets,
            weights=(weights if is_bound else masked).to(torch.float32),
            elbo_weights=(weights * factor).to(torch.float32),
            counted=masked if self.weighting == "maskgit" else valid,
            valid=valid,
            noise_level=corruption.noise_level.to(torch.float32).expand(targets.shape),
        )

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor | None:
        """Later keys hidden at random while attention is annealed; None from then on."""
        if self.attention_annealing_steps == 0:
            return None
        return hidden_future(
            batch.first_sample // self.batch_size,
            self.attention_annealing_steps,
            batch.tokens.shape[1] - 1,
            seed=seed,
            device=batch.tokens.device,
        )

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """Weighted sum of -log p(clean token) over the masked slots."""
        return masked_loss_sums(logits, rows, self.vocab_size, tp_group)

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        return masked_counts(inputs)

    def noised_probability(self, noise_level: Tensor) -> Tensor:
        if self.weighting == "count":  # its levels are shares already
            return noise_level
        return self.schedule.mask_rate(noise_level)

    def _draw(self, sample_index: Tensor, seed: int, stream: Stream) -> tuple[Tensor, Tensor]:
        """Numbers behind the noise levels, and what their law makes of the bound: float64 [b, 1]"""
        draw = level_draws(
            sample_index, seed, stream, batch_size=self.batch_size, sampling=self.time_sampling
        )
        factor = torch.ones_like(draw)
        if self.time_curriculum is not None:
            draw, factor = self.time_curriculum.at(draw, sample_index // self.batch_size)
        return draw[:, None], factor[:, None]


def masked_loss_sums(
    logits: Tensor, rows: ModelInputs, vocab_size: int, tp_group: ProcessGroup | None
) -> LossSums:
    """Sums of the weighted -log p(clean token) of masked slots, and what is logged of them."""
    nll = target_nll(logits, rows, vocab_size, tp_group)
    sums = weighted_sums(nll, rows)
    sums.metrics["masked_share"] = torch.ones_like(rows.weights).sum()
    sums.metrics["masked_nll"] = nll.detach().sum()
    return sums


def masked_counts(inputs: ModelInputs) -> dict[str, Tensor]:
    """Denominators of `masked_loss_sums`: the masked share is one of the valid slots."""
    counts = loss_and_bound_counts(inputs)
    num_masked = inputs.scored.sum(dtype=torch.float32)
    return {**counts, "masked_share": counts["nelbo"], "masked_nll": num_masked}


def mask_by_time(
    draw: Tensor, bits: Tensor, valid: Tensor, schedule: Schedule, time_floor: float
) -> Corruption:
    """Each valid token masked independently with the rate of t = floor + (1 - floor) * draw.

    draw float64 [b, 1] uniform; bits int64 and valid bool [b, s]. Times below the floor are never
    drawn, so the weight is rescaled to a mean of one per token (a factor of 1 for the linear
    schedule): the bound averaged over the mask rates above that of the floor. Without it a bent
    schedule would report slightly less, or more, than the bound.
    """
    time = time_floor + (1.0 - time_floor) * draw
    lowest_rate = schedule.mask_rate(torch.full_like(time, time_floor))
    rescale = (1.0 - time_floor) / (1.0 - lowest_rate)
    masked = (to_uniform(bits) < schedule.mask_rate(time)) & valid
    return Corruption(masked, schedule.elbo_weight(time) * rescale, noise_level=time)


def mask_by_count(draw: Tensor, bits: Tensor, valid: Tensor) -> Corruption:
    """Of l valid tokens the n = 1 + floor(l * draw) with the smallest keys masked.

    Shapes as in `mask_by_time`. A stable sort breaks ties of keys by position.
    """
    num_valid = valid.sum(dim=1, keepdim=True)
    count = (1 + (num_valid * draw).floor().to(torch.int64)).minimum(num_valid)
    keys = torch.where(valid, bits, torch.iinfo(torch.int64).max)
    rank = torch.empty_like(bits)
    order = torch.argsort(keys, dim=1, stable=True)
    rank.scatter_(1, order, slots_like(bits))
    share = count / num_valid.clamp(min=1).double()
    return Corruption(
        masked=(rank < count) & valid,
        elbo_weight=num_valid / count.clamp(min=1).double(),
        noise_level=share,
    )
