"""Loss as a function of parameters and data: Chinchilla's law, and its versions for repeated data.

All are fitted as Hoffmann et al. 2022 (approach 3) do: the Huber loss between logarithms, minimised
from many starts. Residuals of a few runs that went wrong then move the fit but little. They descend
with L-BFGS; we take a trust-region Gauss-Newton method to the same minimum, some 100 times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from scipy.optimize import least_squares

from megatron_dlm.scaling.bootstrap import Estimate, Floats, Indices, intervals, resamples

_HUBER_DELTA = 1e-3
_MAX_STARTS = 64
_MAX_EVALUATIONS = 200


@dataclass(frozen=True)
class Observation:
    """The final loss of one run."""

    parameters: float
    unique_tokens: float
    epochs: float
    loss_nats: float

    @property
    def tokens(self) -> float:
        """Trained on, repeats included."""
        return self.unique_tokens * self.epochs


class Law(Protocol):
    """log L(runs; theta) and its gradient."""

    names: tuple[str, ...]
    """What the numbers of theta are; those that start with log_ are logarithms."""
    starts: tuple[tuple[float, ...], ...]
    """Values from which each number is searched."""

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """runs [n, 3] of log N, log U, log epochs -> log L [n], its gradient [n, k]."""


class Chinchilla:
    """L = E + A / N^alpha + B / D^beta, with D the tokens trained on, repeats counted as new."""

    names: tuple[str, ...] = ("log_e", "log_a", "log_b", "alpha", "beta")
    starts: tuple[tuple[float, ...], ...] = (
        (-1.0, 0.0, 1.0),
        (0.0, 5.0, 10.0),
        (0.0, 5.0, 10.0),
        (0.2, 0.5, 0.8),
        (0.2, 0.5, 0.8),
    )

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """See `Law.log_loss`."""
        log_e, log_a, log_b, alpha, beta = theta
        log_n, log_d = runs[:, 0], runs[:, 1] + runs[:, 2]
        terms = np.stack([np.full_like(log_n, log_e), log_a - alpha * log_n, log_b - beta * log_d])
        total, shares = _log_sum(terms)
        slopes = [shares[0], shares[1], shares[2], -shares[1] * log_n, -shares[2] * log_d]
        return total, np.stack(slopes, axis=1)


class Repeated:
    """Chinchilla's law where the i-th repetition of data is worth less than the one before.

    D is replaced by U (1 + R (1 - exp(-(epochs - 1) / R))): Muennighoff et al. 2023, equation 5,
    without their term for excess parameters. As epochs grow the loss falls to a floor.
    """

    names: tuple[str, ...] = (*Chinchilla.names, "log_r")
    starts: tuple[tuple[float, ...], ...] = (*Chinchilla.starts, (1.0, 3.0, 6.0))

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """See `Law.log_loss`."""
        log_e, log_a, log_b, alpha, beta, log_r = theta
        log_n, log_u, repeats = runs[:, 0], runs[:, 1], np.expm1(runs[:, 2])
        half_life = np.exp(log_r)
        decay = np.exp(-repeats / half_life)
        worth = 1 + half_life * (1 - decay)
        log_d = log_u + np.log(worth)
        terms = np.stack([np.full_like(log_n, log_e), log_a - alpha * log_n, log_b - beta * log_d])
        total, shares = _log_sum(terms)
        worth_slope = half_life * (1 - decay) - repeats * decay  # d worth / d log_r
        slopes = [
            *(shares[0], shares[1], shares[2], -shares[1] * log_n, -shares[2] * log_d),
            -shares[2] * beta * worth_slope / worth,
        ]
        return total, np.stack(slopes, axis=1)


class Overfitted:
    """`Repeated`, and too many epochs do harm: plus (epochs N^mu / (K U^nu))^gamma.

    A law without the last term cannot turn up again, as validation losses of repeated data do. The
    harm is of order one where epochs = K U^nu / N^mu, the form in which Quokka states the best
    number of epochs (U^0.39 / N^0.55).
    """

    names: tuple[str, ...] = (*Repeated.names, "log_k", "mu", "nu", "gamma")
    starts: tuple[tuple[float, ...], ...] = (
        *Repeated.starts,
        (0.0, 6.0),
        (0.5,),
        (0.5,),
        (1.0, 2.0),
    )

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """See `Law.log_loss`."""
        without, slopes_without = Repeated().log_loss(theta[:6], runs)
        log_k, mu, nu, gamma = theta[6:]
        log_n, log_u, log_epochs = runs.T
        inner = log_epochs + mu * log_n - log_k - nu * log_u
        total, shares = _log_sum(np.stack([without, gamma * inner]))
        harm = shares[1]
        slopes = [-gamma * harm, gamma * log_n * harm, -gamma * log_u * harm, inner * harm]
        return total, np.concatenate(
            [slopes_without * shares[0][:, None], np.stack(slopes, axis=1)], axis=1
        )


LAWS: dict[str, Callable[[], Law]] = {
    "chinchilla": Chinchilla,
    "repeated": Repeated,
    "overfitted": Overfitted,
}


@dataclass(frozen=True)
class ParametricFit:
    """A fitted law; predicts the loss of other runs."""

    law: Law
    theta: tuple[float, ...]
    huber: float
    """Mean Huber loss of the residuals of log L."""
    intervals: dict[str, Estimate]
    """Empty without bootstrap."""

    def __getitem__(self, name: str) -> float:
        return self.theta[self.law.names.index(name)]

    def loss(self, parameters: float, unique_tokens: float, epochs: float = 1.0) -> float:
        """Predicted loss in nats."""
        run = np.log([[parameters, unique_tokens, epochs]])
        return float(np.exp(self.law.log_loss(np.asarray(self.theta), run)[0][0]))


def fit_law(
    name: str, runs: Sequence[Observation], *, count: int = 0, seed: int = 0
) -> ParametricFit:
    """The best of many starts; with `count` resamples also intervals, each begun at the best.

    Raises ValueError for an unknown law, and for fewer runs than the law has numbers.
    """
    if name not in LAWS:
        raise ValueError(f"law {name} is none of {', '.join(LAWS)}")
    law = LAWS[name]()
    if len(runs) < len(law.names):
        raise ValueError(
            f"{len(runs)} runs cannot fix the {len(law.names)} numbers of the law {name}; give "
            f"{len(law.names)} runs or more"
        )
    inputs = np.log([[run.parameters, run.unique_tokens, run.epochs] for run in runs])
    targets = np.log([run.loss_nats for run in runs])
    best = min(
        (_descend(law, np.array(start), inputs, targets) for start in _starts(law, seed)),
        key=lambda found: found[1],
    )
    found = {}
    if count:
        drawn = np.array(
            [
                _descend(law, best[0], inputs[chosen], targets[chosen])[0]
                for chosen in resamples(len(runs), count, seed)
            ]
        )
        found = dict(zip(law.names, intervals(best[0].tolist(), drawn), strict=True))
    return ParametricFit(law, tuple(best[0].tolist()), best[1], found)


def _starts(law: Law, seed: int) -> list[tuple[float, ...]]:
    grid = list(product(*law.starts))
    if len(grid) <= _MAX_STARTS:
        return grid
    chosen: Indices = np.random.default_rng(seed).choice(len(grid), _MAX_STARTS, replace=False)
    return [grid[place] for place in chosen]


def _descend(law: Law, start: Floats, inputs: Floats, targets: Floats) -> tuple[Floats, float]:
    """Where the descent ends, and the mean Huber loss there."""

    def residuals(theta: Floats) -> Floats:
        return np.nan_to_num(law.log_loss(theta, inputs)[0] - targets, nan=1e3, posinf=1e3)

    def slopes(theta: Floats) -> Floats:
        return np.nan_to_num(law.log_loss(theta, inputs)[1])

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        result = least_squares(
            residuals,
            start,
            jac=slopes,
            loss="huber",
            f_scale=_HUBER_DELTA,
            x_scale="jac",
            max_nfev=_MAX_EVALUATIONS,
        )
    return result.x, float(result.cost) / len(targets)


def _log_sum(terms: Floats) -> tuple[Floats, Floats]:
    """log of the sum of exp over the first axis, and the share of every term in it."""
    highest = terms.max(axis=0)
    parts = np.exp(terms - highest)
    total = parts.sum(axis=0)
    return highest + np.log(total), parts / total
