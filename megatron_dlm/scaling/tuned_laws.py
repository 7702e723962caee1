"""Best batch size by tokens, and best learning rate by batch size, from grids of runs.

As in section 4 of "Scaling Behavior of Discrete Diffusion Language Models": runs without annealing,
at several batch sizes and learning rates, for one or more sizes of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.bootstrap import Floats, intervals
from megatron_dlm.scaling.minima import Minima, Point, find_minima, reasons
from megatron_dlm.scaling.power_law import PowerLaw, PowerLawFit, lines, r_squared

_SAME_DIGITS = 6
"""Batch sizes that agree in so many digits are one: they come out of a division."""

_SAME_LENGTH = 0.99
"""Runs whose tokens differ by less are as long as each other."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    run: str
    setting: str
    """What else differs between runs, such as the size of the model; each is judged by itself."""
    batch_tokens: float
    learning_rate: float
    score: float
    """Loss in nats."""
    tokens: Floats
    """[n], rising."""
    loss_nats: Floats
    """[n]"""


@dataclass(frozen=True)
class TunedLaw(PowerLawFit):
    """The best setting as a power law."""

    points: tuple[tuple[float, float], ...]
    """x and best setting, of every minimum."""
    left_out: tuple[str, ...]
    """What of the grid does not count, and why."""


def fit_learning_rate_law(runs: Sequence[GridRun], *, count: int = 1000, seed: int = 0) -> TunedLaw:
    """Best learning rate against batch size in tokens: a parabola in log rate per batch size.

    Runs that end before the longest one of their batch size have a higher loss for that alone, and
    are left out. Raises ValueError where fewer than two batch sizes have a best rate among those
    tried.
    """
    groups: dict[tuple[str, float], list[GridRun]] = {}
    for run in runs:
        groups.setdefault((run.setting, _rounded(run.batch_tokens)), []).append(run)
    batches = [batch for _, batch in groups]
    if len(set(batches)) < 2:
        raise ValueError(
            f"all runs have batches of {batches[0]:.4g} tokens; the law needs two sizes of batch, "
            "each with four learning rates"
        )
    names = [f"batch {batch:.4g} tokens{_of(setting)}" for setting, batch in groups]
    points: list[Point] = []
    short: list[str] = []
    for place, (name, members) in enumerate(zip(names, groups.values(), strict=True)):
        longest = max(float(run.tokens[-1]) for run in members)
        enough = _SAME_LENGTH * longest
        points += [
            Point(float(place), run.learning_rate, run.score, run.run)
            for run in members
            if run.tokens[-1] >= enough
        ]
        ends = [f"{r.run} at {r.tokens[-1]:.3g}" for r in members if r.tokens[-1] < enough]
        if ends:
            short.append(f"{name}: {', '.join(ends)} of {longest:.3g} tokens, too short to compare")
    minima = find_minima(points, count=count, seed=seed)
    log_batch = np.log([batches[int(group)] for group in minima.groups])
    drawn_log_batch = np.broadcast_to(log_batch, minima.drawn_log_settings.shape)
    return _through(minima, log_batch, drawn_log_batch, names, short=short)


def fit_batch_law(
    runs: Sequence[GridRun], *, num_levels: int = 5, count: int = 1000, seed: int = 0
) -> TunedLaw:
    """Batch size in tokens that reaches a loss with the fewest tokens, against those tokens.

    At `num_levels` losses per setting; at every loss a parabola of log tokens in log batch size, of
    the learning rate that is best there. Raises ValueError where fewer than two have a minimum.
    """
    points: list[Point] = []
    names: list[str] = []
    for setting in dict.fromkeys(run.setting for run in runs):
        of_setting = [run for run in runs if run.setting == setting]
        for level in loss_levels(of_setting, num_levels):
            points += [
                Point(float(len(names)), run.batch_tokens, np.log(tokens), run.run)
                for run, tokens in reached(of_setting, level)
            ]
            names.append(f"loss {level:.4g}{_of(setting)}")
    if not points:
        raise ValueError(
            "no loss is reached by runs of three batch sizes or more; the law needs four sizes of "
            "batch, for one size of model"
        )
    minima = find_minima(points, count=count, seed=seed)
    return _through(minima, minima.values, minima.drawn_values, names)


def loss_levels(runs: Sequence[GridRun], count: int) -> list[float]:
    """Losses, highest first, that `reached` has of four batch sizes and no run begins below.

    Of three sizes where there are no more; none where there are fewer.
    """
    lowest = sorted(
        min(max(float(run.loss_nats.min()) for run in seeds) for seeds in rates.values())
        for rates in _by_rate(runs).values()
    )
    if len(lowest) < 3:
        return []
    low = lowest[min(3, len(lowest) - 1)]
    high = min(float(run.loss_nats[0]) for run in runs)
    if low >= high:
        return []
    return [float(level) for level in np.geomspace(high, low, count + 1)[1:]]


def reached(runs: Sequence[GridRun], level: float) -> list[tuple[GridRun, float]]:
    """Runs of the best learning rate of every batch size, with the tokens they need for a loss.

    The best is the rate whose runs all reach it, with the fewest tokens on average in logarithms; a
    batch size without such a rate has none.
    """
    chosen: list[tuple[GridRun, float]] = []
    for rates in _by_rate(runs).values():
        pairs = [[(run, _tokens_to(run, level)) for run in seeds] for seeds in rates.values()]
        whole = [of_rate for of_rate in pairs if all(np.isfinite(t) for _, t in of_rate)]
        if whole:
            chosen += min(
                whole, key=lambda of_rate: float(np.mean(np.log([t for _, t in of_rate])))
            )
    return chosen


def _by_rate(runs: Sequence[GridRun]) -> dict[float, dict[float, list[GridRun]]]:
    """Batch size -> learning rate -> runs."""
    found: dict[float, dict[float, list[GridRun]]] = {}
    for run in runs:
        rates = found.setdefault(_rounded(run.batch_tokens), {})
        rates.setdefault(run.learning_rate, []).append(run)
    return found


def _tokens_to(run: GridRun, level: float) -> float:
    """Where the curve first comes down to a loss, between reports in log tokens; or infinity."""
    below = np.flatnonzero(run.loss_nats <= level)
    if len(below) == 0:
        return float("inf")
    place = int(below[0])
    if place == 0:
        return float(run.tokens[0])
    losses, log_tokens = run.loss_nats[place - 1 : place + 1], np.log(run.tokens)
    share = (losses[0] - level) / (losses[0] - losses[1])
    return float(np.exp(log_tokens[place - 1] * (1 - share) + log_tokens[place] * share))


def _through(
    minima: Minima,
    log_x: Floats,
    drawn_log_x: Floats,
    names: Sequence[str],
    *,
    short: Sequence[str] = (),
) -> TunedLaw:
    unfound = {names[int(group)]: why for group, why in minima.left_out.items()}
    if len(minima.groups) < 2:
        told = "; ".join([reasons(unfound), *short]).removeprefix("; ")
        why = f": {told}" if told else ""
        raise ValueError(
            f"{len(minima.groups)} groups of runs have a best setting; a law needs two{why}"
        )
    if np.ptp(log_x) <= 1e-9:
        raise ValueError("all best settings are at one x; a law needs two")
    weight = np.ones(len(log_x))
    coefficient, exponent = lines(log_x, minima.log_settings[None], weight)[0]
    drawn = lines(drawn_log_x, minima.drawn_log_settings, weight)
    of_coefficient, of_exponent = intervals([float(coefficient), float(exponent)], drawn)
    law = PowerLaw(float(coefficient), float(exponent))
    x, best = np.exp(log_x), np.exp(minima.log_settings)
    return TunedLaw(
        law=law,
        coefficient=of_coefficient,
        exponent=of_exponent,
        r_squared=r_squared(law, x, best),
        points=tuple(zip(x.tolist(), best.tolist(), strict=True)),
        drawn=drawn,
        left_out=(*(f"{name}: {why}" for name, why in unfound.items()), *short),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_SAME_DIGITS}g}")


def _of(setting: str) -> str:
    return f" of {setting}" if setting else ""
