"""Loss by parameters and data: Chinchilla's law, and its versions for repeated data."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron_dlm.scaling.bootstrap import Floats


class Law(Protocol):
    """log L(runs; theta) and its gradient, for many theta at once."""

    names: tuple[str, ...]
    """What the numbers of theta are; those that start with log_ are logarithms."""
    starts: tuple[tuple[float, ...], ...]
    """Values from which each number is searched."""

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """theta [..., k], runs [n, 3] of log N, log U, log epochs -> log L [..., n] and its
        gradient [k, ..., n]."""


class Chinchilla:
    """L = E + A / N^alpha + B / D^beta, with D the tokens trained on, repeats counted as new.

    Hoffmann et al. 2022, equation 2.
    """

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
        log_e, log_a, log_b, alpha, beta = _columns(theta)
        log_n, log_d = runs[:, 0], runs[:, 1] + runs[:, 2]
        total, (of_e, of_n, of_d) = _log_sum(log_e, log_a - alpha * log_n, log_b - beta * log_d)
        return total, np.stack([of_e, of_n, of_d, -of_n * log_n, -of_d * log_d])


class Repeated:
    """Chinchilla's law where the i-th repetition of data is worth less than the one before.

    D is replaced by U (1 + R (1 - exp(-(epochs - 1) / R))): Muennighoff et al. 2023, equation 5,
    without their term for excess parameters. As epochs grow the loss falls to a floor.
    """

    names: tuple[str, ...] = (*Chinchilla.names, "log_r")
    starts: tuple[tuple[float, ...], ...] = (*Chinchilla.starts, (1.0, 3.0, 6.0))

    def log_loss(self, theta: Floats, runs: Floats) -> tuple[Floats, Floats]:
        """See `Law.log_loss`."""
        log_e, log_a, log_b, alpha, beta, log_r = _columns(theta)
        log_n, log_u, repeats = runs[:, 0], runs[:, 1], np.expm1(runs[:, 2])
        half_life = np.exp(log_r)
        decay = np.exp(-repeats / half_life)
        worth = 1 + half_life * (1 - decay)
        log_d = log_u + np.log(worth)
        total, (of_e, of_n, of_d) = _log_sum(log_e, log_a - alpha * log_n, log_b - beta * log_d)
        worth_slope = half_life * (1 - decay) - repeats * decay  # d worth / d log_r
        of_r = -of_d * beta * worth_slope / worth
        return total, np.stack([of_e, of_n, of_d, -of_n * log_n, -of_d * log_d, of_r])


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
        without, slopes = Repeated().log_loss(theta[..., :6], runs)
        log_k, mu, nu, gamma = _columns(theta[..., 6:])
        log_n, log_u, log_epochs = runs.T
        inner = log_epochs + mu * log_n - log_k - nu * log_u
        total, (rest, harm) = _log_sum(without, gamma * inner)
        of_k = -gamma * harm
        own = np.stack([of_k, -of_k * log_n, of_k * log_u, inner * harm])
        return total, np.concatenate([slopes * rest, own])


LAWS: dict[str, type[Chinchilla] | type[Repeated] | type[Overfitted]] = {
    "chinchilla": Chinchilla,
    "repeated": Repeated,
    "overfitted": Overfitted,
}


def _columns(theta: Floats) -> Floats:
    """[k, ..., 1]: the numbers of theta [..., k], to be broadcast over runs."""
    return np.moveaxis(theta, -1, 0)[..., None]


def _log_sum(*terms: Floats) -> tuple[Floats, list[Floats]]:
    """log of the sum of exp of all terms, and the share of every term in it."""
    highest = terms[0]
    for term in terms[1:]:
        highest = np.maximum(highest, term)
    parts = [np.exp(term - highest) for term in terms]
    total = sum(parts[1:], parts[0])
    return highest + np.log(total), [part / total for part in parts]
