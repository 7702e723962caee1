"""Power laws, IsoFLOP parabolas and batch laws find the truth that made their data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.scaling.batch_law import IsoLoss, fit_iso_loss
from megatron_dlm.scaling.isoflop import (
    Trained,
    TrainingCurve,
    at_budgets,
    budgets_of,
    fit_compute_optimal,
    optima_of,
)
from megatron_dlm.scaling.minima import fit_parabola
from megatron_dlm.scaling.power_law import PowerLaw, fit_power_law, fit_with_intervals, r_squared
from megatron_dlm.scaling.published import NOISE_TYPES


def test_an_exact_law_is_found_exactly() -> None:
    truth = PowerLaw(0.03, 0.57)
    x = np.geomspace(1e17, 1e20, 7)
    law = fit_power_law(x, [truth(value) for value in x])
    assert law.coefficient == pytest.approx(0.03, rel=1e-9)
    assert law.exponent == pytest.approx(0.57, rel=1e-12)


def test_weights_leave_out_what_weighs_nothing() -> None:
    law = fit_power_law([1, 10, 100], [2, 20, 7], [1, 1, 0])
    assert (law.coefficient, law.exponent) == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, -1], "a power law needs positive numbers"),
        ([3, 3], [1, 2], "at two different x at least"),
    ],
)
def test_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(x, y)


def test_intervals_need_a_point_to_spare() -> None:
    with pytest.raises(ValueError, match="2 points leave nothing to judge a power law by"):
        fit_with_intervals([1, 2], [1, 3])
    with pytest.raises(ValueError, match="1 points leave nothing"):
        fit_with_intervals([1, 2, 3], [1, 3, 5], labels=["a", "a", "a"])


def test_points_of_one_run_are_no_new_evidence() -> None:
    """Every point four times: the interval stays as wide only if they are known to be copies."""
    random = np.random.default_rng(3)
    x = np.geomspace(1, 100, 8)
    y = x**0.5 * np.exp(random.normal(0, 0.05, 8))
    alone = fit_with_intervals(x, y).exponent
    x, y, runs = np.tile(x, 4), np.tile(y, 4), list(range(8)) * 4
    copies = fit_with_intervals(x, y, labels=runs).exponent
    strangers = fit_with_intervals(x, y).exponent
    width = alone.high - alone.low
    assert copies.high - copies.low == pytest.approx(width, rel=0.2)
    assert strangers.high - strangers.low < 0.6 * width


def test_share_of_the_variance() -> None:
    law = PowerLaw(2.0, 0.5)
    x = np.geomspace(1, 100, 5)
    assert r_squared(law, x, 2 * x**0.5) == pytest.approx(1)
    assert r_squared(PowerLaw(2.0, 0.0), x, np.full(5, 2.0)) == 0.0


def isoflop_models(name: str, noise: float = 0.0, seed: int = 0) -> list[Trained]:
    """Models around the published optimum of a noise type, at the paper's budgets."""
    random = np.random.default_rng(seed)
    published = NOISE_TYPES[name]
    models = []
    for compute in np.geomspace(5e17, 2e20, 6):
        for offset in np.linspace(-1.2, 1.2, 7):
            size = published.flops_per_token(compute) * np.exp(offset)
            loss = published.loss_nats(compute) + 0.03 * offset**2
            models.append(Trained(float(compute), float(size), loss + random.normal(0, noise)))
    return models


@pytest.mark.parametrize("name", NOISE_TYPES)
def test_published_coefficients_come_back(name: str) -> None:
    published = NOISE_TYPES[name]
    found = fit_compute_optimal(isoflop_models(name), count=20)
    assert found.size.exponent == pytest.approx(published.flops_per_token.exponent, abs=1e-6)
    assert found.size.coefficient == pytest.approx(published.flops_per_token.coefficient, rel=1e-4)
    assert found.loss.exponent == pytest.approx(published.loss_nats.exponent, abs=1e-6)
    assert found.loss.coefficient == pytest.approx(published.loss_nats.coefficient, rel=1e-4)
    assert found.size.exponent + found.data.exponent == pytest.approx(1)
    # As published: compute = FLOPs per token times tokens, up to the digits in the table.
    assert found.data.exponent == pytest.approx(published.tokens.exponent, abs=1e-3)
    assert found.data(1e19) == pytest.approx(published.tokens(1e19), rel=0.01)


def test_noisy_models_give_intervals_around_the_truth() -> None:
    found = fit_compute_optimal(isoflop_models("masked", noise=0.003), count=200)
    for name, truth in (("size", 0.566), ("data", 0.434), ("loss", -0.0496)):
        assert found.intervals[name].low < truth < found.intervals[name].high, name
    assert len(found.optima) == 6


def test_a_budget_without_an_optimum_is_left_out_with_its_reason() -> None:
    downwards = [Trained(1e18, size, 9 - (np.log(size) ** 2) / 100) for size in (1e8, 1e9, 1e10)]
    sizes = np.geomspace(1e8, 1e9, 5)
    outside = [Trained(2e18, s, 2 + 0.1 * (np.log(s) - np.log(1e10)) ** 2) for s in sizes]
    optima, left_out = optima_of([*downwards, *outside, *isoflop_models("masked")])
    assert len(optima) == 6
    assert left_out[1e18] == "the losses have no lowest point"
    assert left_out[2e18] == "the best, 1e+10, lies outside of what was tried, 1e+08 to 1e+09"
    found = fit_compute_optimal([*downwards, *isoflop_models("masked")], count=20)
    assert list(found.left_out) == [1e18]
    assert found.size.exponent == pytest.approx(0.566, abs=1e-6)
    with pytest.raises(
        ValueError, match=r"0 budgets have a best size; laws need two: 1e\+18 FLOPs"
    ):
        fit_compute_optimal(downwards)


def test_a_parabola_needs_a_lowest_point() -> None:
    with pytest.raises(ValueError, match="needs three different settings"):
        fit_parabola([1, 1, 2], [3, 3, 2])
    with pytest.raises(ValueError, match="no lowest point"):
        fit_parabola([1, 2, 4, 8], [3, 3, 3, 3])
    with pytest.raises(ValueError, match="no lowest point"):
        fit_parabola([1, 2, 4, 8], [4, 3, 2, 1])


def test_a_budget_of_three_models_is_left_out_with_its_reason() -> None:
    """Its parabola goes through them however wrong they are: no errors, at the ends of the law."""
    models = isoflop_models("masked", noise=0.003)
    three = [m for n, m in enumerate(models) if n % 7 in (1, 3, 5)]
    first, last = models[0].compute_flops, models[-1].compute_flops
    ends = [model for model in three if model.compute_flops in (first, last)]
    middle = [model for model in models if first < model.compute_flops < last]
    assert len(ends) == 6
    for weighted in (False, True):
        found = fit_compute_optimal([*ends, *middle], count=200, weighted=weighted)
        alone = fit_compute_optimal(middle, count=200, weighted=weighted)
        assert len(found.optima) == 4
        assert found.size == alone.size
        assert list(found.left_out) == [first, last]
        assert found.left_out[first] == (
            "3 runs at 3 settings leave nothing to judge the parabola by; train four settings, or "
            "each of three twice"
        )
    with pytest.raises(
        ValueError, match=r"0 budgets .* 5e\+17 FLOPs, .*: 3 runs at 3 settings leave"
    ):
        fit_compute_optimal(three)
    # Of two seeds each run has another beside it; one size without leaves that one unjudged.
    again = [replace(model, loss_nats=model.loss_nats + 1e-3) for model in three]
    assert len(fit_compute_optimal([*three, *again], count=20).optima) == 6
    assert len(fit_compute_optimal([*three, *again[1:]], count=20).optima) == 5


def test_missing_models_and_seeds_of_one_size() -> None:
    """Some sizes of some budgets are missing, others there twice; budgets differ by rounding."""
    models = isoflop_models("balanced", noise=0.002, seed=4)
    models += isoflop_models("balanced", noise=0.002, seed=5)[::3]
    models = [m for n, m in enumerate(models) if n not in (0, 8, 20, 33, 40)]
    moved = [
        Trained(m.compute_flops * (1 + 1e-12 * n), m.size, m.loss_nats, f"run {n}")
        for n, m in enumerate(models)
    ]
    found = fit_compute_optimal(moved, count=200)
    assert len(found.optima) == 6
    assert found.size.exponent == pytest.approx(0.534, abs=0.02)
    assert found.intervals["size"].low < 0.534 < found.intervals["size"].high


def crowded_models(seed: int) -> list[Trained]:
    """Five budgets, the sizes of the last one close together; sizes in parameters."""
    random = np.random.default_rng(seed)
    models = []
    for place, compute in enumerate(np.geomspace(1e18, 1e20, 5)):
        for offset in np.linspace(-1, 1, 9) * (0.35 if place == 4 else 1):
            size = float(1e8 * (compute / 1e18) ** 0.5 * np.exp(offset))
            loss = float(3 + 0.05 * offset**2 + random.normal(0, 1e-3))
            models.append(Trained(float(compute), size, loss, "", float(compute / (9 * size))))
    return models


def test_tokens_need_not_follow_from_compute() -> None:
    found = fit_compute_optimal(crowded_models(0), count=20)
    assert found.optima[0].data == pytest.approx(1e18 / (9 * found.optima[0].size), rel=1e-6)


def test_precision_weighs_by_how_sizes_surround_the_best() -> None:
    """As that is known beforehand, and the noise of one budget is not, intervals stay honest."""
    errors, held = [], []
    for seed in range(40):
        models = crowded_models(seed)
        plain, sure = (fit_compute_optimal(models, count=100, weighted=w) for w in (False, True))
        errors.append((plain.size.exponent - 0.5, sure.size.exponent - 0.5))
        interval = sure.intervals["size"]
        held.append(interval.low <= 0.5 <= interval.high)
    plain_error, sure_error = np.sqrt(np.mean(np.square(errors), axis=0))
    assert sure_error < 0.7 * plain_error
    assert np.mean(held) >= 0.85


def test_budgets_are_read_off_curves_that_reach_them() -> None:
    tokens, losses = np.array([1e10, 1e11, 1e12]), np.array([4.0, 3.0, 2.0])
    curve = TrainingCurve("a", 7.0, 1e7, tokens, losses)
    models = at_budgets([curve], [1e16, 10**17.5, 1e19 * (1 + 1e-12), 1e20])
    assert [model.compute_flops for model in models] == [10**17.5, 1e19 * (1 + 1e-12)]
    assert models[0] == Trained(10**17.5, 7.0, pytest.approx(3.5), "a", pytest.approx(10**10.5))


def test_budgets_lie_where_the_curves_judge_a_parabola() -> None:
    losses = np.array([4.0, 3.0])
    ends = ((1e17, 1e19), (2e17, 5e19), (1e18, 1e20), (5e18, 9e20))
    curves = [
        TrainingCurve(str(n), 1.0 + n, 1.0, np.array(pair), losses) for n, pair in enumerate(ends)
    ]
    # Four sizes, which overlap from the begin of the last to the end of the first.
    assert np.array(budgets_of([curves], 5))[[0, -1]] == pytest.approx((5e18, 1e19))
    # Three with two runs each are as good, unless only the best of a size counts.
    twice = [*curves[:3], *curves[:3]]
    assert np.array(budgets_of([twice], 5))[[0, -1]] == pytest.approx((1e18, 1e19))
    assert np.array(budgets_of([[*curves, *curves]], 5))[[0, -1]] == pytest.approx((1e18, 5e19))
    best = budgets_of([[*curves, *curves]], 5, one_per_size=True)
    assert np.array(best)[[0, -1]] == pytest.approx((5e18, 1e19))
    # No budget lies in a gap between two ranges, nor where one of two lines has too few.
    both = ((1e17, 1e18), (1e19, 1e20))
    gaps = [
        TrainingCurve(f"{n} {pair}", 1.0 + n, 1.0, np.array(pair), losses)
        for n in range(4)
        for pair in both
    ]
    found = np.array(budgets_of([gaps], 8))
    assert [int(((found > low / 1.001) & (found < high * 1.001)).sum()) for low, high in both] == [
        4,
        4,
    ]
    long = [replace(curve, tokens=np.array([1e17, 1e20])) for curve in gaps]
    assert np.array(budgets_of([long, curves], 5))[[0, -1]] == pytest.approx((5e18, 1e19))
    # Three sizes have parabolas to draw, and no law.
    assert np.array(budgets_of([curves[:3]], 5))[[0, -1]] == pytest.approx((1e18, 1e19))
    with pytest.raises(ValueError, match="no range of compute is covered by the curves of three"):
        budgets_of([curves[:2]], 5)


@pytest.mark.parametrize("sharpness", [0.15, 1.0])
def test_an_iso_loss_curve_is_found(sharpness: float) -> None:
    truth = IsoLoss(2000.0, 30_000.0, sharpness)
    batches = np.geomspace(60_000, 6e6, 8)
    found = fit_iso_loss([truth.steps(batch) for batch in batches], batches.tolist()).law
    assert found.sharpness == pytest.approx(sharpness, rel=1e-6)
    assert found.min_steps == pytest.approx(2000, rel=1e-6)
    assert found.min_batch_tokens == pytest.approx(30_000, rel=1e-6)
    excess = [
        (value / low) ** sharpness - 1 for value, low in ((truth.steps(1e5), 2e3), (1e5, 3e4))
    ]
    assert excess[0] * excess[1] == pytest.approx(1)


@pytest.mark.parametrize("sharpness", [0.15, 0.5, 1.0])
def test_the_batch_of_fewest_tokens(sharpness: float) -> None:
    curve = IsoLoss(1000.0, 10_000.0, sharpness)
    batches = curve.least_tokens_batch * np.geomspace(0.9, 1 / 0.9, 201)
    tokens = [curve.steps(batch) * batch for batch in batches]
    assert abs(int(np.argmin(tokens)) - 100) <= 1


def test_a_batch_that_never_gets_there() -> None:
    with pytest.raises(ValueError, match="the smallest that does is 1e\\+04"):
        IsoLoss(1000.0, 10_000.0, 0.5).steps(9_000)


def test_an_iso_loss_curve_with_too_few_points() -> None:
    with pytest.raises(ValueError, match="needs three different batch sizes"):
        fit_iso_loss([1, 2, 3], [5, 5, 6])
    with pytest.raises(ValueError, match="three points leave nothing to judge"):
        fit_iso_loss([30, 20, 15], [5, 6, 7], count=100)
