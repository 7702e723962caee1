"""How often the 95 % intervals of every law hold a truth that is known. docs/scaling.md has the
numbers of the slow ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from megatron_dlm.scaling.batch_law import IsoLoss, fit_iso_loss
from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.isoflop import (
    Trained,
    TrainingCurve,
    at_budgets,
    budgets_of,
    fit_compute_optimal,
)
from megatron_dlm.scaling.parametric import Observation, fit_law
from megatron_dlm.scaling.parametric_laws import LAWS
from megatron_dlm.scaling.power_law import fit_with_intervals
from megatron_dlm.scaling.published import NOISE_TYPES

_RESAMPLES = 200
_THETA = (np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28)
TRUTHS = {
    "chinchilla": _THETA,
    "repeated": (*_THETA, np.log(15.4)),
    "overfitted": (*_THETA, np.log(15.4), np.log(3e3), 0.55, 0.39, 1.5),
}
Trial = Callable[[int], Iterator[tuple[Estimate, float]]]
"""Seed -> estimates with their truths."""


def power_law(num_points: int, *, is_uneven: bool = False) -> Trial:
    """Uneven: the noise of the largest x is several times that of the smallest."""

    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        x = 10 ** np.linspace(17, 20, num_points)
        width = 0.01 * (0.3 + np.linspace(0, 2, num_points)) if is_uneven else 0.01
        y = 2.0 * x**-0.05 * np.exp(random.normal(0, width, num_points))
        found = fit_with_intervals(x, y, count=_RESAMPLES, seed=seed)
        yield found.exponent, -0.05
        yield found.coefficient, 2.0

    return trial


def compute_optimal(num_sizes: int) -> Trial:
    """A run for every size of every budget."""

    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        law = NOISE_TYPES["masked"]
        models = []
        for budget in np.geomspace(5e17, 2e20, 6):
            for offset in np.linspace(-1.2, 1.2, num_sizes):
                loss = law.loss_nats(budget) + 0.05 * offset**2 + random.normal(0, 0.003)
                size = law.flops_per_token(budget) * np.exp(offset)
                models.append(Trained(float(budget), float(size), float(loss)))
        found = fit_compute_optimal(models, count=_RESAMPLES, seed=seed)
        yield found.intervals["size"], law.flops_per_token.exponent
        yield found.intervals["loss"], law.loss_nats.exponent

    return trial


def curves(num_sizes: int) -> Trial:
    """A run for every size, read at six budgets: most of its noise is common to all of them."""

    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        law = NOISE_TYPES["masked"]
        ends = (law.flops_per_token(1e17), law.flops_per_token(1e21))
        models = []
        for place, size in enumerate(np.geomspace(*ends, num_sizes)):
            common = random.normal(0, 0.003)
            for budget in np.geomspace(5e17, 2e20, 6):
                offset = np.log(size / law.flops_per_token(budget))
                noise = common + random.normal(0, 0.001)
                loss = law.loss_nats(budget) + 0.05 * offset**2 + noise
                models.append(Trained(float(budget), float(size), float(loss), str(place)))
        found = fit_compute_optimal(models, count=_RESAMPLES, seed=seed)
        yield found.intervals["size"], law.flops_per_token.exponent
        yield found.intervals["loss"], law.loss_nats.exponent

    return trial


def chosen_budgets(
    num_sizes: int,
    span: float,
    *,
    num_seeds: int = 1,
    is_white: bool = False,
    weighted: bool = False,
) -> Trial:
    """Curves of equally many tokens at the budgets that `scaling fit` chooses, whose ends few
    sizes reach.

    span: from the first tokens to the last, in steps from size to size: that many sizes and one
    more reach the middle budgets. White: every report of a run has a noise of its own, instead of
    one for all of them.
    """
    law = NOISE_TYPES["masked"]
    sizes = np.geomspace(law.flops_per_token(1e17), law.flops_per_token(1e21), num_sizes)
    half = span / 2 * np.log(sizes[1] / sizes[0])
    # The middle size is the best one half way.
    tokens = 1e19 / sizes[num_sizes // 2] * np.exp(np.linspace(-half, half, 40))

    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        curves = []
        for place in range(num_sizes * num_seeds):
            size = float(sizes[place % num_sizes])
            best = np.array([law.flops_per_token(c) for c in size * tokens])
            losses = np.array([law.loss_nats(c) for c in size * tokens])
            losses += 0.05 * np.log(size / best) ** 2
            losses += random.normal(0, 0.0 if is_white else 0.003)
            losses += random.normal(0, 0.003 if is_white else 0.001, len(tokens))
            curves.append(TrainingCurve(str(place), size, size, tokens, losses))
        models = at_budgets(curves, budgets_of([curves], 6))
        found = fit_compute_optimal(models, count=_RESAMPLES, seed=seed, weighted=weighted)
        yield found.intervals["size"], law.flops_per_token.exponent
        yield found.intervals["loss"], law.loss_nats.exponent

    return trial


def iso_loss(num_batches: int) -> Trial:
    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        truth = IsoLoss(2000.0, 30_000.0, 0.5)
        batches = np.geomspace(60_000, 6e6, num_batches)
        steps = [truth.steps(b) * np.exp(random.normal(0, 0.02)) for b in batches]
        found = fit_iso_loss(steps, batches.tolist(), count=_RESAMPLES, seed=seed)
        yield found.intervals["sharpness"], truth.sharpness
        yield found.intervals["least_tokens_batch"], truth.least_tokens_batch

    return trial


def parametric(name: str, num_runs: int) -> Trial:
    def trial(seed: int) -> Iterator[tuple[Estimate, float]]:
        random = np.random.default_rng(seed)
        ranges = ((7, 10), (8, 11), (0, 2.5))
        inputs = np.log(10 ** np.stack([random.uniform(*r, num_runs) for r in ranges], axis=1))
        values, _ = LAWS[name]().log_loss(np.array(TRUTHS[name]), inputs)
        losses = np.exp(values + random.normal(0, 0.003, num_runs))
        facts = np.concatenate([np.exp(inputs), losses[:, None]], axis=1).tolist()
        found = fit_law(name, [Observation(*row) for row in facts], count=_RESAMPLES, seed=seed)
        for place, key in enumerate(found.law.names):
            yield found.intervals[key], TRUTHS[name][place]

    return trial


def coverage(trial: Trial, count: int) -> float:
    held = [e.low <= truth <= e.high for seed in range(count) for e, truth in trial(seed)]
    return float(np.mean(held))


@pytest.mark.parametrize(
    ("trial", "count"),
    [
        (power_law(5), 150),
        (power_law(30), 150),
        (power_law(30, is_uneven=True), 150),
        (compute_optimal(7), 60),
        (curves(6), 60),
        (chosen_budgets(9, 6.5), 40),
        (chosen_budgets(9, 6.5, is_white=True, weighted=True), 40),
        (iso_loss(8), 3),
        (parametric("chinchilla", 60), 4),
    ],
    ids=[
        *["5 points", "30 points", "uneven", "budgets", "curves", "chosen", "chosen, weighted"],
        *["iso-loss", "chinchilla"],
    ],
)
def test_intervals_hold_the_truth(trial: Trial, count: int) -> None:
    """Too few trials to tell 90 % from 95 %, enough to tell them from 75 %."""
    assert coverage(trial, count) >= 0.83


SLOW = {
    "power law, 5 points": (power_law(5), 1000),
    "power law, 8 points": (power_law(8), 1000),
    "power law, 30 points": (power_law(30), 1000),
    "power law, 30 points of uneven noise": (power_law(30, is_uneven=True), 1000),
    "isoflop, 6 budgets of 5 runs": (compute_optimal(5), 500),
    "isoflop, 6 budgets of 7 runs": (compute_optimal(7), 500),
    "isoflop, 7 curves at 6 budgets": (curves(7), 500),
    "isoflop, 5 curves at the chosen budgets": (chosen_budgets(5, 5.5), 300),
    "isoflop, 7 curves at the chosen budgets": (chosen_budgets(7, 4.6), 300),
    "isoflop, 9 curves at the chosen budgets": (chosen_budgets(9, 6.5), 300),
    "isoflop, 9 curves of white noise": (chosen_budgets(9, 6.5, is_white=True), 300),
    "isoflop, 9 curves, by precision": (chosen_budgets(9, 6.5, weighted=True), 300),
    "isoflop, 9 white curves, by precision": (
        chosen_budgets(9, 6.5, is_white=True, weighted=True),
        300,
    ),
    "isoflop, 2 seeds of 3 sizes": (chosen_budgets(5, 2.6, num_seeds=2), 300),
    "iso-loss, 8 batch sizes": (iso_loss(8), 200),
    "chinchilla, 50 runs": (parametric("chinchilla", 50), 60),
    "chinchilla, 200 runs": (parametric("chinchilla", 200), 60),
    "repeated, 200 runs": (parametric("repeated", 200), 40),
    "overfitted, 200 runs": (parametric("overfitted", 200), 20),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SLOW)
def test_measured_coverage(name: str) -> None:
    found = coverage(*SLOW[name])
    print(f"\n{name}: {found:.1%}")
    assert found >= 0.86
