"""Compute-optimal models: the best size at every compute budget, and the laws through them.

Method: Hoffmann et al. 2022 (approach 2), as used in "Scaling Behavior of Discrete Diffusion
Language Models" section 4: at every budget the loss is a parabola in the logarithm of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate, Floats, Indices, estimates
from megatron_dlm.scaling.power_law import PowerLaw, fit_power_law


@dataclass(frozen=True)
class Trained:
    """One model, trained with one budget."""

    compute_flops: float
    size: float
    """Parameters, or FLOPs per token: whatever size the law shall be in."""
    loss_nats: float

    @property
    def data(self) -> float:
        """compute / size: tokens where size is in FLOPs per token."""
        return self.compute_flops / self.size


@dataclass(frozen=True)
class Parabola:
    """loss = lowest + curvature * (log size - log best_size)^2."""

    best_size: float
    lowest: float
    curvature: float
    is_inside: bool
    """Whether the best size lies between the smallest and the largest that were trained."""


@dataclass(frozen=True)
class Optimum:
    """The best model of one budget."""

    compute_flops: float
    size: float
    loss_nats: float
    num_models: int
    is_inside: bool

    @property
    def data(self) -> float:
        """compute / size."""
        return self.compute_flops / self.size


@dataclass(frozen=True)
class ComputeOptimal:
    """Best size, data and loss as power laws of compute."""

    optima: tuple[Optimum, ...]
    size: PowerLaw
    data: PowerLaw
    loss: PowerLaw
    intervals: dict[str, Estimate]
    """"size", "data" and "loss": the exponents."""


def fit_parabola(sizes: Sequence[float] | Floats, losses: Sequence[float] | Floats) -> Parabola:
    """Least squares of a parabola in log size.

    Raises ValueError for fewer than three sizes, and where it opens downwards: no best size.
    """
    log_size = np.log(np.asarray(sizes, dtype=np.float64))
    values = np.asarray(losses, dtype=np.float64)
    if len(np.unique(log_size)) < 3:
        raise ValueError("a parabola needs three different sizes; train more at this budget")
    center = log_size.mean()  # far from 0 the powers would lose digits
    curvature, slope, offset = np.polyfit(log_size - center, values, 2)
    if curvature <= 0:
        raise ValueError("the losses of this budget have no lowest point in the size")
    best = -slope / (2 * curvature)
    return Parabola(
        best_size=float(np.exp(center + best)),
        lowest=float(offset - curvature * best**2),
        curvature=float(curvature),
        is_inside=bool(log_size.min() <= center + best <= log_size.max()),
    )


def optima_of(models: Sequence[Trained]) -> tuple[Optimum, ...]:
    """The best model of every budget, smallest budget first.

    Raises ValueError, which names the budget, where one has none.
    """
    optima = []
    for compute in sorted({model.compute_flops for model in models}):
        of_budget = [model for model in models if model.compute_flops == compute]
        try:
            parabola = fit_parabola(
                [model.size for model in of_budget], [model.loss_nats for model in of_budget]
            )
        except ValueError as error:
            raise ValueError(f"compute {compute:.3g} FLOPs: {error}") from None
        optima.append(
            Optimum(
                compute,
                parabola.best_size,
                parabola.lowest,
                num_models=len(of_budget),
                is_inside=parabola.is_inside,
            )
        )
    return tuple(optima)


def fit_compute_optimal(
    models: Sequence[Trained], *, count: int = 1000, seed: int = 0
) -> ComputeOptimal:
    """Power laws through the optima; intervals by resampling the models of every budget.

    Raises ValueError where a budget has no optimum, or all have the same compute.
    """
    table = np.array([[m.compute_flops, m.size, m.loss_nats] for m in models], dtype=np.float64)

    def fit(chosen: Indices) -> list[float]:
        laws = _laws(optima_of([Trained(*row) for row in table[chosen].tolist()]))
        return [law.exponent for law in laws]

    exponents = estimates(
        fit, len(models), count=count, seed=seed, groups=[m.compute_flops for m in models]
    )
    optima = optima_of(models)
    size, data, loss = _laws(optima)
    names = ("size", "data", "loss")
    return ComputeOptimal(optima, size, data, loss, dict(zip(names, exponents, strict=True)))


def _laws(optima: Sequence[Optimum]) -> tuple[PowerLaw, PowerLaw, PowerLaw]:
    compute = [optimum.compute_flops for optimum in optima]
    return (
        fit_power_law(compute, [optimum.size for optimum in optima]),
        fit_power_law(compute, [optimum.data for optimum in optima]),
        fit_power_law(compute, [optimum.loss_nats for optimum in optima]),
    )


def at_budgets(
    curves: Sequence[tuple[float, Floats, Floats]], budgets: Sequence[float]
) -> list[Trained]:
    """Models at given budgets, read off training curves that never anneal.

    curves: (size, compute so far [n], loss [n]). Losses between two reports are interpolated in the
    logarithm of compute; a curve says nothing about budgets outside of it.
    """
    found = []
    for size, compute, loss in curves:
        for budget in budgets:
            if compute[0] <= budget <= compute[-1]:
                value = np.interp(np.log(budget), np.log(compute), loss)
                found.append(Trained(budget, size, float(value)))
    return found
