"""Parametric laws: gradients against differences, and the truth found again under noise."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.parametric import LAWS, Observation, fit_law

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
        np.testing.assert_allclose(slopes[:, place], difference, rtol=1e-5, atol=1e-7)


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
