"""The noise of hybrid diffusion as samplers need it. Needs PyTorch and nothing else.

At log-SNR l a token is clean with probability alpha = sigmoid(l); otherwise it is noise, drawn from
pi = s u + (1 - s) m: uniform over the N - 1 text ids (all but the mask) with probability s(l), else
the mask (arXiv 2512.10858). Exported models carry a copy of this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NoiseSchedule = Literal["cosine", "linear"]
Prior = Literal["noise", "mask", "uniform"]

LOG_SNR_LIMIT = 9.0  # models are trained on [-9, 9]
_FIRST_TIME, _LAST_TIME = 0.999, 0.001


@dataclass(frozen=True)
class HybridNoise:
    """Which share s(l) of noise is uniform: sigmoid(scale l + bias), or GIDD's mixing by p_u."""

    bias: float = 0.0
    scale: float = 1.0
    uniform_probability: float | None = None
    """p_u: s = B / (r + B) with B = 2 p_u / (1 - p_u) and r^2 + B r = exp(-l) (arXiv 2503.04482);
    scale and bias then have no meaning."""

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 1:
            raise ValueError(f"noise scale is {self.scale}; it must lie in [0, 1]")
        if self.uniform_probability is not None and not 0 <= self.uniform_probability < 1:
            raise ValueError(
                f"uniform_probability is {self.uniform_probability}; it must lie in [0, 1)"
            )

    def uniform_share(self, log_snr: float) -> float:
        """s(l)"""
        if self.uniform_probability is None:
            return _sigmoid(self.scale * log_snr + self.bias)
        height = 2 * self.uniform_probability / (1 - self.uniform_probability)
        noise_ratio = math.exp(-log_snr)
        ratio = 2 * noise_ratio / (height + math.sqrt(height**2 + 4 * noise_ratio))
        return height / (ratio + height)


@dataclass(frozen=True)
class Level:
    """The law of one slot at one log-SNR."""

    clean: float
    """alpha"""
    one_text_id: float
    """Probability of noise that is this text id: beta s / (N - 1)."""
    mask: float
    """beta (1 - s)"""


class NoiseProcess:
    """The noise of a vocabulary."""

    def __init__(self, noise: HybridNoise, mask_id: int, vocab_size: int) -> None:
        self.noise, self.mask_id, self.num_text_ids = noise, mask_id, vocab_size - 1
        self.prior_share = noise.uniform_share(-LOG_SNR_LIMIT)
        """Share of uniform tokens where all is noise."""
        self.has_uniform = noise.uniform_share(LOG_SNR_LIMIT) > 0

    def levels(self, schedule: NoiseSchedule, num_steps: int) -> list[Level]:
        """num_steps + 1 levels, from the prior's to the clean one."""
        span = (_LAST_TIME - _FIRST_TIME) / num_steps
        times = [_FIRST_TIME + span * step for step in range(num_steps)]
        return [*(self._level(_log_snr(schedule, time)) for time in times), Level(1.0, 0.0, 0.0)]

    def _level(self, log_snr: float) -> Level:
        log_snr = min(max(log_snr, -LOG_SNR_LIMIT), LOG_SNR_LIMIT)
        noisy, share = _sigmoid(-log_snr), self.noise.uniform_share(log_snr)
        return Level(1.0 - noisy, noisy * share / self.num_text_ids, noisy * (1.0 - share))

    def share_of(self, prior: Prior) -> float:
        """Share of uniform tokens in the text before the first step."""
        return {"noise": self.prior_share, "mask": 0.0, "uniform": 1.0}[prior]

    def of_token(self, tokens: Tensor, text_id: float, mask: float) -> Tensor:
        """float64: a number of text ids or of the mask, by token."""
        values = torch.full(tokens.shape, text_id, dtype=torch.float64, device=tokens.device)
        return values.masked_fill(tokens == self.mask_id, mask)

    def draw(self, share: float, kind: Tensor, which: Tensor) -> Tensor:
        """Ids of noise with this share of uniform tokens, by two uniform numbers in [0, 1)."""
        ids = (which * self.num_text_ids).long()
        ids = ids + (ids >= self.mask_id)  # the mask is no text id
        return ids.masked_fill(kind >= share, self.mask_id)


def _log_snr(schedule: NoiseSchedule, time: float) -> float:
    alpha = 1.0 - time if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * time)
    return math.log(alpha / (1.0 - alpha))


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))
