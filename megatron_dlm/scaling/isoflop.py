"""Compute-optimal models: the best size at every compute budget, and the laws through them.

Method: Hoffmann et al. 2022 (approach 2), as used in "Scaling Behavior of Discrete Diffusion
Language Models" section 4: at every budget the loss is a parabola in the logarithm of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, intervals
from megatron_dlm.scaling.minima import Minima, Point, find_minima, is_judged, reasons
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
    """Budgets without a best size that counts, and why: it lies outside of those trained, or too
    few runs judge it."""


def optima_of(models: Sequence[Trained]) -> tuple[tuple[Optimum, ...], dict[float, str]]:
    """The best model of every budget, smallest first; and the budgets without one, with why."""
    minima = find_minima(_points(models), count=0)
    return _optima(minima, _token_lines(models)), minima.left_out


def fit_compute_optimal(
    models: Sequence[Trained], *, count: int = 1000, seed: int = 0, weighted: bool = False
) -> ComputeOptimal:
    """Power laws through the optima; intervals by a wild bootstrap over the runs.

    weighted: every optimum counts by how well the sizes of its budget surround it (1 / variance of
    its logarithm, with one noise for all runs: that of a few runs is not known well enough to weigh
    by), instead of all alike. Raises ValueError where fewer than two budgets have an optimum.
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
    weights = np.ones((len(NAMES), len(optima)))
    if weighted:
        of_size, of_loss = 1 / minima.variances
        weights = np.stack([of_size, of_size, of_loss * minima.values**2])
    fits, drawn = {}, {}
    for place, (name, weight) in enumerate(zip(NAMES, weights, strict=True)):
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


def unreached(models: Sequence[Trained], budgets: Sequence[float]) -> dict[float, str]:
    """The budgets without any model, with that as the reason."""
    reached = {model.compute_flops for model in models}
    return {budget: "no run has a loss there" for budget in budgets if budget not in reached}


def lowest_models(models: Sequence[Trained]) -> list[Trained]:
    """Of every size at every budget the model with the lowest loss, whatever else differs."""
    best: dict[tuple[float, float], Trained] = {}
    for model in sorted(models, key=lambda model: model.loss_nats):
        best.setdefault((model.compute_flops, model.size), model)
    return list(best.values())


def budgets_of(
    lines: Sequence[Sequence[TrainingCurve]], count: int, *, one_per_size: bool = False
) -> list[float]:
    """`count` budgets, evenly in logarithms, at all of which the curves of every line judge a
    parabola.

    That takes four sizes, or three of two runs each (`is_judged`); one_per_size: of the runs of a
    size only one will count. Where no range has so many it is that of three sizes, whose parabolas
    can be drawn and not judged. Raises ValueError where there is none either.
    """
    ends = [
        [(curve.size, *np.log(curve.compute_flops[[0, -1]]).tolist()) for curve in curves]
        for curves in lines
    ]
    marks = sorted({mark for curves in ends for _, *both in curves for mark in both})
    spans = [(low, high) for low, high in pairwise(marks) if high - low > _SAME]

    def sizes_at(log_budget: float) -> list[list[float]]:
        found = [[size for size, *both in each if both[0] < log_budget < both[1]] for each in ends]
        return [sorted(set(sizes)) if one_per_size else sizes for sizes in found]

    for is_enough in (is_judged, lambda sizes: len(set(sizes)) >= 3):
        covered = np.array([s for s in spans if all(map(is_enough, sizes_at(sum(s) / 2)))])
        if len(covered):
            # Every span follows the one before without a gap, and has its share of the budgets.
            starts = np.concatenate([[0], np.cumsum(covered[:, 1] - covered[:, 0])])
            places = np.linspace(0, starts[-1], count)
            span = np.searchsorted(starts[:-1], places, side="right") - 1
            return [float(b) for b in np.exp(covered[span, 0] + places - starts[span])]
    raise ValueError(
        "no range of compute is covered by the curves of three sizes"
        + (" in every line" if len(lines) > 1 else "")
        + "; train the small ones longer, report more often, or name the budgets"
    )


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
