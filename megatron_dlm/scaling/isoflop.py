"""Compute-optimal models: the best size at every compute budget, and the laws through them.

Method: Hoffmann et al. 2022 (approach 2), as used in "Scaling Behavior of Discrete Diffusion
Language Models" section 4: at every budget the loss is a parabola in the logarithm of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, intervals
from megatron_dlm.scaling.minima import Minima, Point, find_minima, reasons
from megatron_dlm.scaling.power_law import PowerLaw, lines

NAMES = ("size", "data", "loss")
"""What has a law."""

_SAME = 1e-9
"""Budgets closer than this, relative, are one: they come out of products of rounded numbers."""


@dataclass(frozen=True)
class Trained:
    """One model, trained with one budget."""

    compute_flops: float
    size: float
    """Parameters, or FLOPs per token: whatever size the law shall be in."""
    loss_nats: float
    run: str = ""
    """Points of one run share its errors; without a name every point is a run of its own."""
    tokens: float = 0.0
    """Trained on; 0: compute / size, which holds where size is in FLOPs per token."""

    @property
    def data(self) -> float:
        """Tokens."""
        return self.tokens or self.compute_flops / self.size


@dataclass(frozen=True)
class TrainingCurve:
    """The validations of one run whose learning rate is not annealed."""

    run: str
    size: float
    flops_per_token: float
    tokens: Floats
    """[n], rising."""
    loss_nats: Floats
    """[n]"""

    @property
    def compute_flops(self) -> Floats:
        """[n]: spent until each validation."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Optimum:
    """The best model of one budget."""

    compute_flops: float
    size: float
    loss_nats: float
    num_models: int
    data: float
    """Tokens."""


@dataclass(frozen=True)
class ComputeOptimal:
    """Best size, data and loss as power laws of compute."""

    optima: tuple[Optimum, ...]
    size: PowerLaw
    data: PowerLaw
    loss: PowerLaw
    intervals: dict[str, Estimate]
    """"size", "data" and "loss": the exponents."""
    drawn: dict[str, Floats]
    """The same names -> [resamples, 2]: coefficient and exponent of every resample."""
    left_out: dict[float, str]
    """Budgets without a best size among those trained, and why."""


def optima_of(models: Sequence[Trained]) -> tuple[tuple[Optimum, ...], dict[float, str]]:
    """The best model of every budget, smallest first; and the budgets without one, with why."""
    minima = find_minima(_points(models), count=0)
    return _optima(minima, _token_lines(models)), minima.left_out


def fit_compute_optimal(
    models: Sequence[Trained], *, count: int = 1000, seed: int = 0, weighted: bool = False
) -> ComputeOptimal:
    """Power laws through the optima; intervals by a wild bootstrap over the runs.

    weighted: every optimum counts by how sure it is (1 / variance of its logarithm over resamples),
    instead of all alike. Raises ValueError where fewer than two budgets have an optimum.
    """
    minima = find_minima(_points(models), count=count, seed=seed)
    if len(minima.groups) < 2:
        named = {f"{budget:.3g} FLOPs": why for budget, why in minima.left_out.items()}
        why = f": {reasons(named)}" if named else ""
        raise ValueError(f"{len(minima.groups)} budgets have a best size; laws need two{why}")
    token_lines = _token_lines(models)
    optima = _optima(minima, token_lines)
    log_compute = np.log(minima.groups)
    values = np.log([[optimum.size, optimum.data, optimum.loss_nats] for optimum in optima])
    drawn_values = _drawn_values(minima, token_lines)
    fits, drawn = {}, {}
    for place, name in enumerate(NAMES):
        weight = np.ones(len(optima))
        if weighted:
            weight = 1 / np.nanvar(drawn_values[place], axis=0).clip(min=1e-24)
        fits[name] = lines(log_compute, values[None, :, place], weight)[0]
        drawn[name] = lines(log_compute, drawn_values[place], weight)
    size, data, loss = (PowerLaw(float(fits[name][0]), float(fits[name][1])) for name in NAMES)
    exponents = {name: intervals(fits[name].tolist(), drawn[name])[1] for name in NAMES}
    return ComputeOptimal(
        optima, size, data, loss, intervals=exponents, drawn=drawn, left_out=minima.left_out
    )


def at_budgets(curves: Sequence[TrainingCurve], budgets: Sequence[float]) -> list[Trained]:
    """Models at given budgets, read off training curves that never anneal.

    Losses between two reports are interpolated in the logarithm of compute; a curve says nothing
    about budgets outside of it.
    """
    found = []
    for curve in curves:
        compute = curve.compute_flops
        for budget in budgets:
            if compute[0] * (1 - _SAME) <= budget <= compute[-1] * (1 + _SAME):
                value = float(np.interp(np.log(budget), np.log(compute), curve.loss_nats))
                tokens = budget / curve.flops_per_token
                found.append(Trained(budget, curve.size, value, curve.run, tokens))
    return found


def lowest_models(models: Sequence[Trained]) -> list[Trained]:
    """Of every size at every budget the model with the lowest loss, whatever else differs."""
    best: dict[tuple[float, float], Trained] = {}
    for model in sorted(models, key=lambda model: model.loss_nats):
        best.setdefault((model.compute_flops, model.size), model)
    return list(best.values())


def budgets_of(curves: Sequence[TrainingCurve], count: int) -> list[float]:
    """`count` budgets, evenly in logarithms, over the range where three sizes or more have a loss.

    Raises ValueError where there is no such range.
    """
    ends = [(c.size, c.compute_flops[0] * (1 - _SAME), c.compute_flops[-1]) for c in curves]

    def is_covered(budget: float) -> bool:
        return len({size for size, low, high in ends if low <= budget <= high * (1 + _SAME)}) >= 3

    known = sorted(end for _, low, high in ends for end in (low, high) if is_covered(end))
    if not known or known[0] >= known[-1]:
        raise ValueError(
            "no range of compute is covered by the curves of three sizes; train the small ones "
            "longer, or report more often"
        )
    grid = np.geomspace(known[0] * (1 + _SAME), known[-1], count)
    return [float(budget) for budget in grid if is_covered(float(budget))]


def _points(models: Sequence[Trained]) -> list[Point]:
    """Budgets that differ by rounding only become one."""
    found: list[Point] = []
    budget = 0.0
    for place, model in sorted(enumerate(models), key=lambda pair: pair[1].compute_flops):
        if model.compute_flops > budget * (1 + _SAME):
            budget = model.compute_flops
        run = model.run or f"#{place}"
        found.append(Point(budget, model.size, model.loss_nats, run))
    return found


def _token_lines(models: Sequence[Trained]) -> dict[float, tuple[float, float]]:
    """Budget -> coefficient and exponent of tokens against size; a line, as FLOPs per token is."""
    of_budget: dict[float, list[Trained]] = {}
    ordered = sorted(models, key=lambda model: model.compute_flops)
    for point, model in zip(_points(models), ordered, strict=True):
        of_budget.setdefault(point.group, []).append(model)
    found = {}
    for budget, group in of_budget.items():
        log_size = np.log([model.size for model in group])
        if np.ptp(log_size) > _SAME:
            log_data = np.log([model.data for model in group])
            line = lines(log_size, log_data[None], np.ones_like(log_size))[0]
            found[budget] = (float(line[0]), float(line[1]))
    return found


def _optima(minima: Minima, token_lines: dict[float, tuple[float, float]]) -> tuple[Optimum, ...]:
    found = []
    for place, budget in enumerate(minima.groups):
        size = float(np.exp(minima.log_settings[place]))
        tokens = PowerLaw(*token_lines[budget])(size)
        value = float(minima.values[place])
        found.append(Optimum(budget, size, value, minima.num_points[place], tokens))
    return tuple(found)


def _drawn_values(
    minima: Minima, token_lines: dict[float, tuple[float, float]]
) -> tuple[Floats, Floats, Floats]:
    """Logarithms [resamples, budgets] of size, tokens and loss."""
    coefficients, exponents = np.array([token_lines[budget] for budget in minima.groups]).T
    log_size, loss = minima.drawn_log_settings, minima.drawn_values
    log_data = np.log(coefficients) + exponents * log_size
    return log_size, log_data, np.log(np.where(loss > 0, loss, np.nan))
