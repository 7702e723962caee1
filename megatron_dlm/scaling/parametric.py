"""The parametric laws, fitted with intervals, and what they say of other runs.

Fitted as Hoffmann et al. 2022 (approach 3) do: the Huber loss between logarithms, minimised from
many starts. Residuals of a few runs that went wrong then move the fit but little. They descend with
L-BFGS from one start at a time; descent.py reaches the same minimum from all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, case_weights, intervals
from megatron_dlm.scaling.descent import descend
from megatron_dlm.scaling.parametric_laws import LAWS, Law

_MAX_STARTS = 256
_FIRST_STEPS = 25
_FINALISTS = 16
_SAME = 1e-6


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


@dataclass(frozen=True)
class ParametricFit:
    """A fitted law; predicts the loss of other runs."""

    law: Law
    theta: tuple[float, ...]
    huber: float
    """Mean Huber loss of the residuals of log L."""
    intervals: dict[str, Estimate]
    """Empty without bootstrap."""
    drawn: Floats
    """[resamples, k]: theta of every resample."""

    def __getitem__(self, name: str) -> float:
        return self.theta[self.law.names.index(name)]

    def loss(self, parameters: float, unique_tokens: float, epochs: float = 1.0) -> float:
        """Predicted loss in nats."""
        theta = np.asarray(self.theta)
        return float(losses(self.law, theta, (parameters, unique_tokens, epochs)))


def losses(law: Law, theta: Floats, run: tuple[float, float, float]) -> Floats:
    """Losses [...] in nats that theta [..., k] predict for (parameters, unique tokens, epochs)."""
    return np.exp(law.log_loss(theta, np.log([run]))[0][..., 0])


def fit_law(
    name: str, runs: Sequence[Observation], *, count: int = 0, seed: int = 0
) -> ParametricFit:
    """The best of many starts; with `count` resamples of the runs also intervals.

    Every resample begins at the best fit. Raises ValueError for an unknown law, for fewer runs than
    the law has numbers, and for a law that needs repeated data where there is none.
    """
    if name not in LAWS:
        raise ValueError(f"law {name} is none of {', '.join(LAWS)}")
    law = LAWS[name]()
    _check(name, law, runs)
    inputs = np.log([[run.parameters, run.unique_tokens, run.epochs] for run in runs])
    targets = np.log([run.loss_nats for run in runs])
    starts = _starts(law, seed)
    ends, costs = descend(law, starts, inputs, targets, max_steps=_FIRST_STEPS)
    finalists = ends[np.argsort(costs)[:_FINALISTS]]
    ends, costs = descend(law, finalists, inputs, targets)
    theta, huber = ends[costs.argmin()], float(costs.min())
    drawn, found = np.empty((0, len(theta))), {}
    if count:
        weights = case_weights(len(runs), count, seed)
        drawn, _ = descend(law, np.tile(theta, (count, 1)), inputs, targets, weights=weights)
        found = dict(zip(law.names, intervals(theta.tolist(), drawn), strict=True))
    return ParametricFit(law, tuple(theta.tolist()), huber, found, drawn)


def _check(name: str, law: Law, runs: Sequence[Observation]) -> None:
    if len(runs) < len(law.names):
        raise ValueError(
            f"{len(runs)} runs cannot fix the {len(law.names)} numbers of the law {name}; give "
            f"{len(law.names)} runs or more"
        )
    if any(min(run.parameters, run.unique_tokens, run.epochs, run.loss_nats) <= 0 for run in runs):
        raise ValueError(f"the law {name} needs positive numbers; leave the other runs out")
    if np.ptp(np.log([run.parameters for run in runs])) < _SAME:
        raise ValueError(
            f"all runs have {runs[0].parameters:.4g} parameters, so nothing can tell their share "
            "of the loss from its floor; give runs of several sizes"
        )
    if np.ptp(np.log([run.tokens for run in runs])) < _SAME and name == "chinchilla":
        raise ValueError(
            f"all runs have {runs[0].tokens:.4g} tokens, so nothing can tell their share of the "
            "loss from its floor; give runs of several lengths"
        )
    if name != "chinchilla" and all(run.epochs <= 1 for run in runs):
        raise ValueError(
            f"no run repeats its data, so nothing can fix the law {name}; fit chinchilla"
        )


def _starts(law: Law, seed: int) -> Floats:
    """[starts, k]: all combinations, or as many of them as there is time for."""
    grid = np.array(list(product(*law.starts)))
    if len(grid) <= _MAX_STARTS:
        return grid
    chosen = np.random.default_rng(seed).choice(len(grid), _MAX_STARTS, replace=False)
    found: Floats = grid[chosen]
    return found
