"""Hybrid noise on a tiny vocabulary, in float64 from its definitions; ids 0 to N-2, then the mask.

alpha = sigmoid(l); q_l(.|p) = alpha p + (1 - alpha) pi_l; pi_l = s u + (1 - s) m.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_dlm.objectives.noise import NoiseLevels, NoisePath, SigmoidNoise, TimeNoise

TYPES = {"masked": -1000, "low_uniform": -2, "balanced": 0, "high_uniform": 2, "uniform": 1000}
PATHS: dict[str, NoisePath] = {name: SigmoidNoise(1.0, bias) for name, bias in TYPES.items()} | {
    "slow": SigmoidNoise(0.5, 0.7),
    "constant": SigmoidNoise(0.0, -1.0),
    "time 0": TimeNoise(0.0),
    "time 0.2": TimeNoise(0.2),
}


def levels_at(path: NoisePath, log_snr: float) -> NoiseLevels:
    """The path at one log-SNR; the density is not known here."""
    point = torch.tensor(log_snr, dtype=torch.float64)
    return NoiseLevels(point, *path.mixing(point), density=torch.tensor(float("nan")))


@dataclass(frozen=True)
class Law:
    """What a path makes of N ids at one log-SNR, from its uniform share alone."""

    path: NoisePath
    num_ids: int

    def noise(self, log_snr: float) -> np.ndarray:
        """pi_l, [N]"""
        share = float(self.path.mixing(torch.tensor(log_snr, dtype=torch.float64))[0])
        text = np.full(self.num_ids - 1, share / (self.num_ids - 1))
        return np.append(text, 1.0 - share)

    def marginal(self, probabilities: np.ndarray, log_snr: float) -> np.ndarray:
        """q_l(.|p) for p [..., N]."""
        alpha, beta = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
        return alpha * probabilities + beta * self.noise(log_snr)

    def weights(self, log_snr: float) -> np.ndarray:
        """(1 - alpha) (pi_z - pi'_z) / q(z|x), [x, z]; 0 where z cannot be."""
        point = torch.tensor(log_snr, dtype=torch.float64)
        share, slope = (float(value) for value in self.path.mixing(point))
        num_text = self.num_ids - 1
        growth = np.append(np.full(num_text, (share - slope) / num_text), 1 - share + slope)
        marginal = self.marginal(np.eye(self.num_ids), log_snr)
        numerator = np.broadcast_to(growth / (1 + np.exp(log_snr)), marginal.shape)
        return np.divide(numerator, marginal, out=np.zeros_like(marginal), where=marginal > 0)

    def transition(self, clean: float, noisy: float) -> np.ndarray:
        """q(z at `noisy` | z at `clean`): [from, to], clean > noisy."""
        alphas = [1 / (1 + np.exp(-level)) for level in (clean, noisy)]
        noises = [self.noise(level) * (1 / (1 + np.exp(level))) for level in (clean, noisy)]
        ratio = alphas[1] / alphas[0]
        return ratio * np.eye(self.num_ids) + (noises[1] - ratio * noises[0])

    def posterior(self, probabilities: np.ndarray, clean: float, noisy: float) -> np.ndarray:
        """q(z at `clean` | z at `noisy`, p): [noisy id, clean id], for p [noisy id, N] or [N]."""
        before = np.broadcast_to(self.marginal(probabilities, clean), (self.num_ids, self.num_ids))
        joint = before * self.transition(clean, noisy).T
        total = joint.sum(1, keepdims=True)
        return np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)


def kl(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """KL divergence over the last axis, nats; 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(left > 0, left * (np.log(left) - np.log(right)), 0.0).sum(-1)


def integrate(function: Callable[[float], Any], low: float = -9.0, high: float = 9.0) -> Any:
    """Gauss-Legendre quadrature on six pieces, of numbers or arrays."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = 0.0
    for start, end in itertools.pairwise(np.linspace(low, high, 7)):
        for node, weight in zip(nodes, weights, strict=True):
            point = (end - start) / 2 * node + (end + start) / 2
            total = total + (end - start) / 2 * weight * function(point)
    return total
