"""Power laws, IsoFLOP parabolas and batch laws find the truth that made their data."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.scaling.batch_law import IsoLoss, fit_iso_loss
from megatron_dlm.scaling.isoflop import Trained, at_budgets, fit_compute_optimal, fit_parabola
from megatron_dlm.scaling.power_law import PowerLaw, fit_power_law, fit_with_intervals
from megatron_dlm.scaling.published import NOISE_TYPES


def test_an_exact_law_is_found_exactly() -> None:
    truth = PowerLaw(0.03, 0.57)
    x = np.geomspace(1e17, 1e20, 7)
    law = fit_power_law(x, [truth(value) for value in x])
    assert law.coefficient == pytest.approx(0.03, rel=1e-9)
    assert law.exponent == pytest.approx(0.57, rel=1e-12)
    assert law.inverse(law(3e18)) == pytest.approx(3e18, rel=1e-9)


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


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """A bootstrap of 30 points is a little too sure: of 95 % intervals more than 85 % must hold."""
    random = np.random.default_rng(5)
    truth = PowerLaw(2.0, -0.05)
    held = 0
    for seed in range(100):
        x = 10 ** random.uniform(17, 20, 30)
        y = truth.coefficient * x**truth.exponent * np.exp(random.normal(0, 0.01, 30))
        fit = fit_with_intervals(x, y, count=200, seed=seed)
        held += fit.exponent.low <= truth.exponent <= fit.exponent.high
    assert 85 <= held <= 99


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
    assert all(optimum.is_inside for optimum in found.optima)


def test_a_budget_without_an_optimum_is_named() -> None:
    models = [Trained(1e18, size, -(np.log(size) ** 2)) for size in (1e8, 1e9, 1e10)]
    with pytest.raises(ValueError, match=r"compute 1e\+18 FLOPs: the losses .* no lowest point"):
        fit_compute_optimal(models)
    with pytest.raises(ValueError, match="needs three different sizes"):
        fit_parabola([1, 1, 2], [3, 3, 2])


def test_an_optimum_outside_of_the_sizes_says_so() -> None:
    sizes = np.geomspace(1e8, 1e9, 5)
    parabola = fit_parabola(sizes, 2 + 0.1 * (np.log(sizes) - np.log(1e10)) ** 2)
    assert parabola.best_size == pytest.approx(1e10, rel=1e-6)
    assert not parabola.is_inside


def test_budgets_are_read_off_curves_that_reach_them() -> None:
    compute = np.array([1e17, 1e18, 1e19])
    models = at_budgets([(7.0, compute, np.array([4.0, 3.0, 2.0]))], [1e16, 10**17.5, 1e20])
    assert [(model.size, model.compute_flops) for model in models] == [(7.0, 10**17.5)]
    assert models[0].loss_nats == pytest.approx(3.5)


@pytest.mark.parametrize("sharpness", [0.15, 1.0])
def test_an_iso_loss_curve_is_found(sharpness: float) -> None:
    truth = IsoLoss(2000.0, 30_000.0, sharpness)
    batches = np.geomspace(60_000, 6e6, 8)
    found = fit_iso_loss([truth.steps(batch) for batch in batches], batches.tolist())
    assert found.sharpness == pytest.approx(sharpness, rel=1e-3)
    assert found.min_steps == pytest.approx(2000, rel=1e-2)
    assert found.min_batch_tokens == pytest.approx(30_000, rel=1e-2)
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
