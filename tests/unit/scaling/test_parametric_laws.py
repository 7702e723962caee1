"""Parametric laws: gradients against differences, and the truth found again under noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron_dlm.scaling.bootstrap import Floats, case_weights
from megatron_dlm.scaling.descent import HUBER_DELTA, descend
from megatron_dlm.scaling.parametric import Observation, fit_law, losses
from megatron_dlm.scaling.parametric_laws import LAWS, Law

_CHINCHILLA = (np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28)
TRUTHS = {
    "chinchilla": _CHINCHILLA,
    "repeated": (*_CHINCHILLA, np.log(15.4)),
    "overfitted": (*_CHINCHILLA, np.log(15.4), np.log(3e3), 0.55, 0.39, 1.5),
}


def made_up_runs(name: str, count: int, noise: float, seed: int) -> list[Observation]:
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(7, 10, count)
    unique = 10 ** random.uniform(8, 11, count)
    epochs = np.exp(random.uniform(0, np.log(300), count))
    inputs = np.log(np.stack([sizes, unique, epochs], axis=1))
    values, _ = LAWS[name]().log_loss(np.array(TRUTHS[name]), inputs)
    losses = np.exp(values + random.normal(0, noise, count))
    rows = zip(sizes, unique, epochs, losses, strict=True)
    return [Observation(*(float(number) for number in row)) for row in rows]


def as_arrays(runs: list[Observation]) -> tuple[Floats, Floats]:
    inputs = np.log([[run.parameters, run.unique_tokens, run.epochs] for run in runs])
    return inputs, np.log([run.loss_nats for run in runs])


@pytest.mark.parametrize("name", LAWS)
def test_gradients(name: str) -> None:
    runs = made_up_runs(name, 20, 0.0, 0)
    inputs = np.log([[run.parameters, run.unique_tokens, run.epochs] for run in runs])
    theta = np.array(TRUTHS[name])
    _, slopes = LAWS[name]().log_loss(theta, inputs)

    def moved(place: int, step: float) -> Floats:
        shift = np.zeros_like(theta)
        shift[place] = step
        return LAWS[name]().log_loss(theta + shift, inputs)[0]

    for place in range(len(theta)):
        difference = (moved(place, 1e-6) - moved(place, -1e-6)) / 2e-6
        np.testing.assert_allclose(slopes[place], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LAWS)
def test_many_numbers_at_once_are_those_one_by_one(name: str) -> None:
    random = np.random.default_rng(7)
    theta = np.array(TRUTHS[name]) * random.uniform(0.9, 1.1, (3, len(TRUTHS[name])))
    inputs, _ = as_arrays(made_up_runs(name, 5, 0.0, 0))
    values, slopes = LAWS[name]().log_loss(theta, inputs)
    for row in range(3):
        value, slope = LAWS[name]().log_loss(theta[row], inputs)
        np.testing.assert_array_equal(values[row], value)
        np.testing.assert_array_equal(slopes[:, row], slope)


def test_the_formula_by_hand() -> None:
    fit = fit_law("chinchilla", made_up_runs("chinchilla", 60, 0.0, 1))
    n, d = 3e8, 4e9
    assert fit.loss(n, d / 4, 4) == pytest.approx(
        1.69 + 406.4 / n**0.34 + 410.7 / d**0.28, rel=1e-4
    )


@pytest.mark.parametrize("name", LAWS)
def test_the_truth_is_found_under_noise(name: str) -> None:
    fit = fit_law(name, made_up_runs(name, 300, 0.003, 2), count=40)
    for place, truth in enumerate(TRUTHS[name]):
        key = fit.law.names[place]
        estimate = fit.intervals[key]
        assert fit[key] == pytest.approx(truth, abs=0.1 + 0.02 * abs(truth)), key
        width = estimate.high - estimate.low
        assert estimate.low - width < truth < estimate.high + width, key


def test_one_epoch_is_chinchilla() -> None:
    """Repetition changes nothing where nothing is repeated."""
    inputs = np.log([[1e9, 1e10, 1.0]])
    plain, _ = LAWS["chinchilla"]().log_loss(np.array(TRUTHS["chinchilla"]), inputs)
    repeated, _ = LAWS["repeated"]().log_loss(np.array(TRUTHS["repeated"]), inputs)
    np.testing.assert_allclose(repeated, plain, rtol=1e-14)


def test_only_the_overfitted_law_turns_up_again() -> None:
    epochs = np.geomspace(1, 3000, 200)
    inputs = np.log([[1e9, 1e9, number] for number in epochs])
    repeated, _ = LAWS["repeated"]().log_loss(np.array(TRUTHS["repeated"]), inputs)
    overfitted, _ = LAWS["overfitted"]().log_loss(np.array(TRUTHS["overfitted"]), inputs)
    assert np.all(np.diff(repeated) <= 1e-12)
    lowest = int(overfitted.argmin())
    assert 0 < lowest < len(epochs) - 1
    assert np.all(np.diff(overfitted[lowest:]) > 0)


def test_outliers_move_it_little() -> None:
    runs = made_up_runs("chinchilla", 100, 0.001, 3)
    spoilt = [
        Observation(
            run.parameters, run.unique_tokens, run.epochs, run.loss_nats * (3 if n < 5 else 1)
        )
        for n, run in enumerate(runs)
    ]
    fit = fit_law("chinchilla", spoilt)
    assert fit["alpha"] == pytest.approx(0.34, abs=0.01)
    assert fit["beta"] == pytest.approx(0.28, abs=0.01)


def test_refused() -> None:
    with pytest.raises(ValueError, match="law kaplan is none of chinchilla, repeated, overfitted"):
        fit_law("kaplan", [])
    with pytest.raises(ValueError, match="3 runs cannot fix the 5 numbers"):
        fit_law("chinchilla", made_up_runs("chinchilla", 3, 0.0, 0))
    fresh = [Observation(1e8 * n, 1e9, 1.0, 3.0) for n in range(1, 12)]
    with pytest.raises(ValueError, match=r"no run repeats its data, .* law repeated; fit chinch"):
        fit_law("repeated", fresh)
    with pytest.raises(ValueError, match=r"all runs have 1e\+09 tokens"):
        fit_law("chinchilla", fresh)
    one_size = [Observation(1e8, 1e9, float(n), 3.0) for n in range(1, 12)]
    with pytest.raises(ValueError, match=r"all runs have 1e\+08 parameters, so nothing can tell"):
        fit_law("repeated", one_size)
    with pytest.raises(ValueError, match="needs positive numbers"):
        fit_law("chinchilla", [*fresh, Observation(1e8, 0.0, 1.0, 3.0)])


def peer(law: Law, start: Floats, inputs: Floats, targets: Floats, weights: Floats) -> float:
    """The mean Huber loss that L-BFGS-B reaches, the method of the paper."""

    def cost(theta: Floats) -> tuple[float, Floats]:
        values, slopes = law.log_loss(theta, inputs)
        residuals = values - targets
        size = np.abs(residuals)
        huber = np.where(
            size <= HUBER_DELTA, residuals**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)
        )
        pull = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return 1e6 * np.average(huber, weights=weights), 1e6 * (slopes * pull) @ weights

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(cost, start, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun) / 1e6


@pytest.mark.parametrize(("name", "noise"), [("chinchilla", 0.02), ("repeated", 0.003)])
def test_no_descent_ends_above_the_peer(name: str, noise: float) -> None:
    """Of the fit, and of resamples of it."""
    runs = made_up_runs(name, 120, noise, 8)
    inputs, targets = as_arrays(runs)
    law, fit = LAWS[name](), fit_law(name, runs)
    everything = np.full(len(runs), 1 / len(runs))
    truth = np.array(TRUTHS[name])
    assert fit.huber <= peer(law, truth, inputs, targets, everything) * (1 + 1e-9)
    weights = case_weights(len(runs), 4, seed=1)
    begins = np.tile(np.array(fit.theta), (4, 1))
    _, costs = descend(law, begins, inputs, targets, weights=weights)
    for row in range(4):
        share = weights[row] / weights[row].sum()
        assert costs[row] <= peer(law, truth, inputs, targets, share) * (1 + 1e-6)


def test_the_best_number_of_epochs_is_found_again() -> None:
    """Of runs whose losses turn up again, at sizes and budgets that no run had."""
    law, truth = LAWS["overfitted"](), np.array(TRUTHS["overfitted"])
    fit = fit_law("overfitted", made_up_runs("overfitted", 300, 0.003, 4), count=100)
    epochs = np.geomspace(1, 1e5, 1001)

    def best_epochs(theta: np.ndarray, parameters: float, unique: float) -> np.ndarray:
        values = [losses(law, theta, (parameters, unique, float(e))) for e in epochs]
        return epochs[np.argmin(values, axis=0)]

    for parameters, unique in ((3e8, 1e9), (2e9, 5e9)):
        expected = float(best_epochs(truth, parameters, unique))
        assert 2 < expected < 1e4
        found = float(best_epochs(np.array(fit.theta), parameters, unique))
        low, high = np.quantile(best_epochs(fit.drawn, parameters, unique), [0.025, 0.975])
        assert found == pytest.approx(expected, rel=0.05)
        assert low * 0.97 <= expected <= high * 1.03
