"""Block diffusion: blocks from left to right, masked diffusion inside each (arXiv 2503.09573).

The model sees [corrupted; clean], 2S slots, so that one pass scores every block behind its clean
past. Blocks of one token are autoregression, one block of S tokens is masked diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.objectives.base import LossSums, slots_like
from megatron_dlm.objectives.masked import (
    Corruption,
    mask_by_count,
    mask_by_time,
    masked_counts,
    masked_loss_sums,
)
from megatron_dlm.objectives.noise_profile import ProfiledLoss
from megatron_dlm.objectives.schedules import Schedule
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Purpose, Stream, random_bits, uniform

_BISECTIONS = 60


@dataclass(frozen=True)
class BlockObjective:
    """Sum over the blocks of the masked bound of a block given all clean tokens before it.

    vocab_size: ids of the softmax. mask_token_id: one of them.
    schedule: alpha(t) of `elbo` and `unweighted`. time_floor: the smallest time drawn.
    batch_size: consecutive samples over which noise levels are stratified.
    block_size: B; the last block of a sample holds what is left.
    weighting: as in `MaskedObjective`, with a block in the place of its sample: elbo, count (n
        uniform on 1..l of the l valid tokens of a block) or unweighted, not a bound.
    lowest_mask_rate, highest_mask_rate: noise levels are drawn between the times of these mask
        rates (count: n / l between them, to a token). Anything but 0 and 1 is no bound: "nelbo"
        then has count 0. Leave the defaults for validation.

    Noise levels, stratified: with one u per step, block j of sample i of a batch of G samples of K
    blocks gets frac(u + k / (G K)), k = (i + floor(j G / K)) K + j. All G K levels of a step lie in
    different intervals of width 1 / (G K), those of one place j over the batch in different
    intervals of width 1 / G, and those of one sample nearly 1 / K apart (to within 1 / G).
    One block per sample: exactly the levels, and the masks, of `MaskedObjective`.
    """

    vocab_size: int
    mask_token_id: int
    schedule: Schedule
    batch_size: int
    block_size: int
    weighting: Literal["elbo", "count", "unweighted"] = "elbo"
    time_sampling: Literal["stratified", "iid"] = "stratified"
    time_floor: float = 1e-3
    lowest_mask_rate: float = 0.0
    highest_mask_rate: float = 1.0

    attention: ClassVar[AttentionPattern] = AttentionPattern.BLOCK
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "nelbo", "masked_share", "masked_nll")
    profiled: ClassVar[ProfiledLoss] = "nll"

    def model_length(self, seq_length: int) -> int:
        return 2 * seq_length

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        return seq_length

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Fields [b, 2S]: the corrupted sample, then the clean one, of which nothing is scored.

        Invalid slots stay as clean context. Documents are not told apart, so none may be given.
        """
        assert batch.document is None, "the configuration refuses documents for block diffusion"
        targets, valid = batch.tokens[:, :-1], batch.valid[:, :-1]
        noise = self._corrupt(batch.sample_index, valid, seed, stream)
        masked, slots = noise.masked, slots_like(targets)
        bound_weights = torch.where(masked, noise.elbo_weight, 0.0).to(torch.float32)
        level = noise.noise_level.to(torch.float32)
        nothing = torch.zeros_like(bound_weights)
        corrupted = ModelInputs(
            tokens=torch.where(masked, self.mask_token_id, targets),
            position_ids=slots,
            targets=targets,
            weights=masked.to(torch.float32) if self.weighting == "unweighted" else bound_weights,
            elbo_weights=nothing if self._is_clipped else bound_weights,
            counted=valid,
            valid=valid,
            noise_level=level,
        )
        never = torch.zeros_like(valid)
        clean = ModelInputs(
            tokens=targets,
            position_ids=slots,
            targets=targets,
            weights=nothing,
            elbo_weights=nothing,
            counted=never,
            valid=never,
            noise_level=nothing,
        )
        return ModelInputs(
            **{
                field.name: torch.cat(
                    [getattr(corrupted, field.name), getattr(clean, field.name)], dim=1
                )
                for field in fields(ModelInputs)
            }
        )

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> None:
        return None

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """Weighted sum of -log p(clean token) over the masked slots."""
        return masked_loss_sums(logits, rows, self.vocab_size, tp_group)

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        counts = masked_counts(inputs)
        if self._is_clipped:
            counts["nelbo"] = torch.zeros_like(counts["nelbo"])
        return counts

    def noised_probability(self, noise_level: Tensor) -> Tensor:
        if self.weighting == "count":  # its levels are shares already
            return noise_level
        return self.schedule.mask_rate(noise_level)

    @property
    def _is_clipped(self) -> bool:
        return (self.lowest_mask_rate, self.highest_mask_rate) != (0.0, 1.0)

    @cached_property
    def _draw_range(self) -> tuple[float, float]:
        """Between which numbers the draw of `mask_by_time` or `mask_by_count` has to lie."""
        if self.weighting == "count" or not self._is_clipped:
            return self.lowest_mask_rate, self.highest_mask_rate
        first, last = (
            time_of_mask_rate(self.schedule, rate)
            for rate in (self.lowest_mask_rate, self.highest_mask_rate)
        )
        floor = self.time_floor
        first, last = ((max(time, floor) - floor) / (1.0 - floor) for time in (first, last))
        return first, last

    def _corrupt(
        self, sample_index: Tensor, valid: Tensor, seed: int, stream: Stream
    ) -> Corruption:
        """Masks, weights and levels, [b, S] each, from the rows [b * K, B] of all blocks."""
        num_samples, length = valid.shape
        num_blocks = -(-length // self.block_size)
        filler = (0, num_blocks * self.block_size - length)

        def blocks(values: Tensor) -> Tensor:
            return pad(values, filler).reshape(-1, self.block_size)

        slots = torch.arange(length, device=valid.device)[None]
        bits = random_bits(seed, stream, Purpose.MASK, sample_index[:, None], slots)
        low, high = self._draw_range
        draw = low + (high - low) * self._noise_draws(sample_index, num_blocks, seed, stream)
        rows = draw.reshape(-1, 1), blocks(bits), blocks(valid)
        if self.weighting == "count":
            found = mask_by_count(*rows)
        else:
            found = mask_by_time(*rows, self.schedule, self.time_floor)

        def samples(values: Tensor) -> Tensor:
            whole = values.expand(-1, self.block_size).reshape(num_samples, -1)
            return whole[:, :length]

        return Corruption(
            samples(found.masked), samples(found.elbo_weight), samples(found.noise_level)
        )

    def _noise_draws(
        self, sample_index: Tensor, num_blocks: int, seed: int, stream: Stream
    ) -> Tensor:
        """Uniform in [0, 1), float64 [b, K]; see the class."""
        block = torch.arange(num_blocks, device=sample_index.device)
        if self.time_sampling == "iid":
            draws = uniform(seed, stream, Purpose.NOISE_LEVEL, sample_index[:, None], block)
            return draws.double()
        step = sample_index // self.batch_size
        offset = uniform(seed, stream, Purpose.NOISE_LEVEL, step, torch.zeros_like(step))
        sample = (sample_index % self.batch_size)[:, None]
        interval = (sample + block * self.batch_size // num_blocks) * num_blocks + block
        num_intervals = self.batch_size * num_blocks
        interval = interval % num_intervals
        return (offset.double()[:, None] + interval.double() / num_intervals).frac()


def time_of_mask_rate(schedule: Schedule, rate: float) -> float:
    """The time t at which a token is masked with this probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(schedule.mask_rate(torch.tensor(middle, dtype=torch.float64))) < rate:
            low = middle
        else:
            high = middle
    return high
