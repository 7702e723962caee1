"""What changes over the first steps of masked training: the law of its times, and who sees whom."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.ops.counter_rng import Purpose, Stream, uniform

_HALF_A_DRAW = 2.0**-25


@dataclass(frozen=True)
class TimeCurriculum:
    """Times around a mean that moves from clean (0) to noisy (1), as in Quokka (arXiv 2510.03280).

    In step k of num_steps times follow a Gaussian of mean k / num_steps and standard deviation
    `width`, cut to [floor, 1]; from step num_steps on they are uniform on it.
    """

    num_steps: int
    width: float
    floor: float

    def at(self, draw: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers in [0, 1) moved to the law of their steps, and the factor 1 / density.

        draw float64, step int64, of one shape; the times are floor + (1 - floor) * result. The
        density is that of the result, so result and factor estimate any integral over [0, 1) as
        the uniform draw does, at the price of more variance.
        """
        length = 1.0 - self.floor
        mean = (step.double() / self.num_steps - self.floor) / length
        width = self.width / length
        below, above = (torch.special.ndtr((end - mean) / width) for end in (0.0, 1.0))
        # An end of the draws may lie so far out that its density rounds to 0.
        inside = draw.clamp(_HALF_A_DRAW, 1.0 - _HALF_A_DRAW)
        score = torch.special.ndtri(below + inside * (above - below))
        largest = 1.0 - torch.finfo(torch.float64).eps
        moved = (mean + width * score).clamp(0.0, largest)
        score = (moved - mean) / width
        density = torch.exp(-0.5 * score**2) / (math.sqrt(2.0 * math.pi) * width * (above - below))
        is_over = step >= self.num_steps
        return torch.where(is_over, draw, moved), torch.where(is_over, 1.0, 1.0 / density)


def hidden_future(
    step: int, num_steps: int, length: int, *, seed: int, device: torch.device
) -> Tensor | None:
    """bool [1, 1, length, length]: keys behind the query hidden while attention opens up.

    Every pair of a query and a later key is hidden with probability 1 - step / num_steps, drawn
    anew in every step and the same for all its samples. None from step num_steps on.
    """
    if step >= num_steps:
        return None
    slots = torch.arange(length, device=device)
    query, key = slots[:, None], slots[None, :]
    index = torch.full_like(key, step)
    draws = uniform(seed, Stream.TRAINING, Purpose.ATTENTION, index, query * length + key)
    return ((key > query) & (draws >= step / num_steps))[None, None]
