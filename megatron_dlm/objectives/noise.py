"""How noise is mixed of the mask and of uniform tokens, as a function of the log-SNR.

At log-SNR l a token stays with probability alpha = sigmoid(l); else it is drawn from
pi = s u + (1 - s) m, with m the mask and u uniform over the text ids: all ids but the mask. A path
says what s is at every l and at which l training looks. All numbers are float64 tensors of any one
shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dlm.config.objective import ObjectiveConfig

LOG_SNR_LIMIT = 9.0
_BIAS_OF_TYPE = {
    "masked": -1000.0,
    "low_uniform": -2.0,
    "balanced": 0.0,
    "high_uniform": 2.0,
    "uniform": 1000.0,
}


@dataclass(frozen=True)
class NoiseLevels:
    """Some points of a path; every field float64 of one shape."""

    log_snr: Tensor
    """l = log(alpha / (1 - alpha))"""
    uniform_share: Tensor
    """s(l): the share of noise that is a uniform token and not the mask."""
    uniform_slope: Tensor
    """ds/dl"""
    density: Tensor
    """p(l) of the law by which l is drawn; it integrates to one over the path."""


class NoisePath(Protocol):
    """One family of noise, from almost clean to almost only noise."""

    def at(self, draw: Tensor) -> NoiseLevels:
        """The levels of uniform numbers in [0, 1): 0 is the cleanest, towards 1 all is noise."""

    def mixing(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """s and ds/dl at these log-SNRs."""


@dataclass(frozen=True)
class SigmoidNoise:
    """s(l) = sigmoid(a l + b), of Scaling Behavior of Discrete Diffusion Language Models (2.2-2.4).

    alpha = 1 - t for t uniform between sigmoid(-9) and sigmoid(9), so that l lies in [-9, 9] with
    density alpha (1 - alpha), normalised to that interval. Scale a must lie in [0, 1]: a larger one
    turns uniform tokens into masks faster than new ones come, which no forward process can, and
    weights of the bound become negative.
    """

    scale: float
    bias: float

    def at(self, draw: Tensor) -> NoiseLevels:
        lowest = 1.0 / (1.0 + math.exp(LOG_SNR_LIMIT))
        time = lowest + (1.0 - 2.0 * lowest) * draw
        log_snr = torch.log((1.0 - time) / time)
        density = time * (1.0 - time) / (1.0 - 2.0 * lowest)
        return NoiseLevels(log_snr, *self.mixing(log_snr), density)

    def mixing(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        score = self.scale * log_snr + self.bias
        share = torch.sigmoid(score)
        return share, self.scale * share * torch.sigmoid(-score)


@dataclass(frozen=True)
class TimeNoise:
    """The mixing of Generalized Interpolating Discrete Diffusion, section 4, with gamma = 1.

    In time t: c = B sqrt(t (1 - t)) with B = 2 p / (1 - p), alpha = (1 - t) / (1 + c) and
    beta pi = (t m + c u) / (1 + c), so that uniform tokens are most, a share p of all, at t = 1/2.
    With r = sqrt(t / (1 - t)) it is exp(-l) = r^2 + B r and s = B / (r + B). t is uniform on
    [1e-4, 1 - 1e-4].
    """

    uniform_probability: float
    time_margin: float = 1e-4

    @property
    def amplitude(self) -> float:
        """B"""
        return 2.0 * self.uniform_probability / (1.0 - self.uniform_probability)

    def at(self, draw: Tensor) -> NoiseLevels:
        length = 1.0 - 2.0 * self.time_margin
        time = self.time_margin + length * draw
        ratio = torch.sqrt(time / (1.0 - time))
        share, slope = self._mixing(ratio)
        noise_ratio = ratio * (ratio + self.amplitude)
        time_per_ratio = 2.0 * ratio / (1.0 + ratio**2) ** 2
        ratio_per_log_snr = noise_ratio / (2.0 * ratio + self.amplitude)
        density = time_per_ratio * ratio_per_log_snr / length
        return NoiseLevels(-torch.log(noise_ratio), share, slope, density)

    def mixing(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        # The positive root of r^2 + B r = exp(-l), without the difference of two like numbers.
        noise_ratio = torch.exp(-log_snr)
        root = torch.sqrt(self.amplitude**2 + 4.0 * noise_ratio)
        return self._mixing(2.0 * noise_ratio / (self.amplitude + root))

    def _mixing(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        share = self.amplitude / (ratio + self.amplitude)
        return share, share * ratio / (2.0 * ratio + self.amplitude)


def noise_path(config: ObjectiveConfig) -> NoisePath:
    """The path of an objective of kind hybrid."""
    if config.noise_type == "time":
        return TimeNoise(config.uniform_probability)
    bias = _BIAS_OF_TYPE[config.noise_type] if config.noise_bias is None else config.noise_bias
    return SigmoidNoise(config.noise_scale, bias)
