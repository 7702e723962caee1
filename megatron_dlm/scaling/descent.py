"""Regression of a law from many starts, or on many resamples, all at once.

The method is Newton's on the Huber loss. Its curvature comes from the runs within delta of the law
alone and may be nearly none; so a multiple of the curvature of the surrogate of Huber 1981 (section
7.8) is added, with which every small step descends, more of it where a step has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.parametric_laws import Law

HUBER_DELTA = 1e-3
"""Of residuals of log L: Hoffmann et al. 2022, section D.2."""

_ROWS = 32
"""Descents side by side: what fits into a cache pays."""
_LONGEST_STEP = 2.0
_TOLERANCE = 1e-8
_IDLE_STEPS = 3
_HIGHEST_DAMPING = 1e8
_EXACT = 1e-19
"""Residuals of some 1e-10 are those of rounding."""


def descend(
    law: Law,
    starts: Floats,
    runs: Floats,
    targets: Floats,
    *,
    weights: Floats | None = None,
    delta: float = HUBER_DELTA,
    max_steps: int = 200,
) -> tuple[Floats, Floats]:
    """Where each descent ends [rows, k], and its weighted mean Huber loss there [rows].

    starts [rows, k]; runs [n, facts]; targets [n] or [rows, n] logarithms of what the law says;
    weights [rows, n], by default all 1. A large delta makes it least squares.
    """
    shape = (len(starts), len(runs))
    weights = np.ones(shape) if weights is None else weights
    targets = np.broadcast_to(targets, shape)
    ends, costs = np.empty_like(starts), np.empty(len(starts))
    for first in range(0, len(starts), _ROWS):
        rows = slice(first, first + _ROWS)
        problem = _Problem(law, runs, targets[rows], weights[rows], delta)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            ends[rows], costs[rows] = _descend(problem, starts[rows], max_steps)
    return ends, costs / weights.sum(axis=1)


@dataclass(frozen=True)
class _Problem:
    """The Huber losses of several rows."""

    law: Law
    runs: Floats
    targets: Floats
    """[rows, n]"""
    weights: Floats
    """[rows, n]"""
    delta: float

    def part(self, rows: NDArray[np.bool_]) -> _Problem:
        """Only some of the rows."""
        return replace(self, targets=self.targets[rows], weights=self.weights[rows])

    def __call__(self, theta: Floats) -> tuple[Floats, Floats, Floats]:
        """theta [r, k] -> cost [r], residuals [r, n], slopes [k, r, n]."""
        values, slopes = self.law.log_loss(theta, self.runs)
        residuals = values - self.targets
        size, delta = np.abs(residuals), self.delta
        huber = np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))
        cost = (self.weights * huber).sum(axis=1)
        return np.where(np.isfinite(cost), cost, np.inf), residuals, slopes

    def steps(self, residuals: Floats, slopes: Floats, damping: Floats) -> Floats:
        """[r, k]: the next step of every row."""
        slopes = np.nan_to_num(slopes, posinf=0.0, neginf=0.0).transpose(1, 0, 2)
        residuals = np.nan_to_num(residuals, nan=1.0, posinf=1e3, neginf=-1e3)
        size = np.abs(residuals)
        surrogate = self.weights * (self.delta / np.maximum(size, self.delta))
        bent = damping[:, None] * surrogate + self.weights * (size <= self.delta)
        matrix = np.matmul(slopes * bent[:, None], slopes.transpose(0, 2, 1))
        gradient = np.matmul(slopes, (surrogate * residuals)[:, :, None])
        # In units in which the diagonal is 1; a number that nothing depends on stays where it is.
        scale = np.sqrt(np.einsum("rkk->rk", matrix))
        scale = np.where(scale > 0, scale, 1.0)
        matrix /= scale[:, :, None] * scale[:, None, :]
        ridge = 1e-10 + 1e-6 * np.minimum(damping, 1e6)
        matrix += np.eye(matrix.shape[1]) * ridge[:, None, None]
        steps: Floats = -np.linalg.solve(matrix, gradient / scale[:, :, None])[:, :, 0] / scale
        longest = np.abs(steps).max(axis=1, keepdims=True)
        shortened: Floats = steps * np.minimum(1.0, _LONGEST_STEP / np.maximum(longest, 1e-300))
        return shortened


def _descend(problem: _Problem, starts: Floats, max_steps: int) -> tuple[Floats, Floats]:
    theta = starts.copy()
    cost, residuals, slopes = problem(theta)
    damping, idle = np.ones(len(theta)), np.zeros(len(theta))
    ends, costs = theta.copy(), cost.copy()
    active = np.arange(len(theta))
    for _ in range(max_steps):
        trial = theta + problem.steps(residuals, slopes, damping)
        new_cost, new_residuals, new_slopes = problem(trial)
        better = new_cost < cost
        gain = np.where(better, cost - new_cost, 0.0)
        # A step that fails teaches nothing of how near the end is.
        idle = np.where(better & (gain > _TOLERANCE * cost), 0, idle + better)
        theta[better], cost[better] = trial[better], new_cost[better]
        residuals[better], slopes[:, better] = new_residuals[better], new_slopes[:, better]
        damping *= np.where(better, 0.25, 5.0)
        ends[active], costs[active] = theta, cost
        going = (idle < _IDLE_STEPS) & (damping < _HIGHEST_DAMPING)
        going &= cost > _EXACT * problem.weights.sum(axis=1)
        if not going.any():
            break
        if not going.all():
            theta, cost, damping, idle = theta[going], cost[going], damping[going], idle[going]
            residuals, slopes, active = residuals[going], slopes[:, going], active[going]
            problem = problem.part(going)
    return ends, costs
