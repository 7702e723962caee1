"""The uniform numbers behind noise levels, one per sample, the same on every rank."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_dlm.ops.counter_rng import Purpose, Stream, uniform

TimeSampling = Literal["stratified", "iid"]


def level_draws(
    sample_index: Tensor, seed: int, stream: Stream, *, batch_size: int, sampling: TimeSampling
) -> Tensor:
    """Uniform in [0, 1), float64 [b], for the samples sample_index (int64 [b]).

    Stratified: sample i of a batch of B gets frac(u + i/B) with one u per step, so every
    interval [k/B, (k+1)/B) holds exactly one sample of the batch, on whatever rank.
    """
    position = torch.zeros_like(sample_index)
    if sampling == "iid":
        return uniform(seed, stream, Purpose.NOISE_LEVEL, sample_index, position).double()
    step = sample_index // batch_size
    offset = uniform(seed, stream, Purpose.NOISE_LEVEL, step, position).double()
    return (offset + (sample_index % batch_size).double() / batch_size).frac()
