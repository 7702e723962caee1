"""How noise is mixed along the log-SNR: both families against their papers' formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hybrid_law import PATHS, TYPES, Law, kl, levels_at

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.hybrid import bound_weights
from megatron_dlm.objectives.noise import NoisePath, SigmoidNoise, TimeNoise, noise_path

DRAWS = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
NUM_IDS = 4
LEVELS = (8.5, 3.0, 0.4, -0.9, -4.0, -8.5)


@pytest.fixture(params=PATHS, name="path")
def _path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def test_levels_fall_and_are_float64(path: NoisePath) -> None:
    levels = path.at(DRAWS)
    for value in (levels.log_snr, levels.uniform_share, levels.uniform_slope, levels.density):
        assert (value.dtype, value.shape) == (torch.float64, DRAWS.shape)
        assert torch.all(torch.isfinite(value))
    assert torch.all(levels.log_snr.diff() < 0)


def test_the_density_is_that_of_the_drawn_levels(path: NoisePath) -> None:
    draws = DRAWS.clone().requires_grad_()
    levels = path.at(draws)
    (slope,) = torch.autograd.grad(levels.log_snr.sum(), draws)
    torch.testing.assert_close(levels.density.detach(), -1 / slope, rtol=1e-9, atol=0)


def test_the_share_and_its_slope_follow_from_the_log_snr(path: NoisePath) -> None:
    levels = path.at(DRAWS)
    log_snr = levels.log_snr.clone().requires_grad_()
    share, slope = path.mixing(log_snr)
    torch.testing.assert_close(share.detach(), levels.uniform_share, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(slope.detach(), levels.uniform_slope, rtol=1e-9, atol=1e-15)
    if share.requires_grad:
        (exact,) = torch.autograd.grad(share.sum(), log_snr)
        torch.testing.assert_close(slope.detach(), exact, rtol=1e-7, atol=1e-12)


def test_log_snr_covers_minus_nine_to_nine() -> None:
    levels = SigmoidNoise(1.0, 0.0).at(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(levels.log_snr, torch.tensor([9.0, 0.0, -9.0]).double())
    alpha = torch.sigmoid(SigmoidNoise(1.0, 0.0).at(DRAWS).log_snr)
    torch.testing.assert_close(alpha.diff(), alpha.diff()[:1].expand(len(alpha) - 1))


@pytest.mark.parametrize("name", TYPES)
def test_types_are_names_of_biases(name: str) -> None:
    assert noise_path(ObjectiveConfig(kind="hybrid", noise_type=name)) == PATHS[name]  # type: ignore[arg-type]
    half, _ = PATHS[name].mixing(torch.tensor(-TYPES[name], dtype=torch.float64))
    assert half.item() == 0.5
    at_ends = PATHS[name].at(DRAWS).uniform_share
    if name == "masked":
        assert torch.all(at_ends == 0)
    if name == "uniform":
        assert torch.all(at_ends == 1)


def test_other_paths_of_the_configuration() -> None:
    biased = ObjectiveConfig(kind="hybrid", noise_bias=0.7, noise_scale=0.5)
    assert noise_path(biased) == SigmoidNoise(0.5, 0.7)
    timed = ObjectiveConfig(kind="hybrid", noise_type="time", uniform_probability=0.1)
    assert noise_path(timed) == TimeNoise(0.1)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.2])
def test_the_time_form_is_that_of_gidd(probability: float) -> None:
    """alpha, the noise and the weights of the bound, from t alone (papers: arXiv 2503.04482)."""
    path, num_text, length = TimeNoise(probability), 6, 1 - 2e-4
    time = 1e-4 + length * DRAWS
    levels = path.at(DRAWS)
    c = 2 * probability / (1 - probability) * (time * (1 - time)).sqrt()
    c_slope = 0.5 * (1 - 2 * time) / (time * (1 - time)) * c
    alpha, beta = (1 - time) / (1 + c), (time + c) / (1 + c)
    torch.testing.assert_close(torch.sigmoid(levels.log_snr), alpha)
    torch.testing.assert_close(torch.sigmoid(-levels.log_snr), beta)
    torch.testing.assert_close(beta * levels.uniform_share, c / (1 + c))
    half = path.at(torch.tensor(0.5, dtype=torch.float64))
    assert (torch.sigmoid(-half.log_snr) * half.uniform_share).item() == pytest.approx(probability)

    growth = c + (1 - time) * c_slope
    expected = {
        (6, 0): 1 / (time * (1 - time)),
        (0, 0): growth / num_text / ((1 - time) * (1 - time + c / num_text)),
    }
    if probability > 0:
        expected[1, 0] = growth / ((1 - time) * c)
    for (noisy, clean), weight in expected.items():
        ids = [torch.full(DRAWS.shape, value) for value in (noisy, clean)]
        ours = bound_weights(levels, *ids, mask_token_id=6, vocab_size=7) / levels.density
        torch.testing.assert_close(ours, weight * length, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_transitions_are_laws_and_compose(name: str) -> None:
    law = Law(PATHS[name], NUM_IDS)
    for clean, middle, noisy in itertools.combinations(LEVELS, 3):
        step = law.transition(clean, noisy)
        assert step.min() > -1e-12
        np.testing.assert_allclose(step.sum(1), 1, atol=1e-12)
        two_steps = law.transition(clean, middle) @ law.transition(middle, noisy)
        np.testing.assert_allclose(two_steps, step, atol=1e-12)
        marginal = law.marginal(np.eye(NUM_IDS), clean) @ step
        np.testing.assert_allclose(marginal, law.marginal(np.eye(NUM_IDS), noisy), atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_posteriors_are_bayes_of_the_transitions(name: str) -> None:
    """Averaged over the noisier token the posterior of a clean token is its marginal."""
    law = Law(PATHS[name], NUM_IDS)
    for clean, noisy in itertools.combinations(LEVELS, 2):
        for token in range(NUM_IDS - 1):
            point = np.eye(NUM_IDS)[token]
            posterior = law.posterior(point, clean, noisy)
            mean = law.marginal(point, noisy) @ posterior
            np.testing.assert_allclose(mean, law.marginal(point, clean), atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_the_bound_is_the_limit_of_small_steps(name: str) -> None:
    """Mean of w (KL + IS) = the KL between posteriors of truth and model, per step of log-SNR."""
    path = PATHS[name]
    law, width = Law(path, NUM_IDS), 1e-4
    random = np.random.default_rng(0)
    model = np.pad(random.dirichlet(np.ones(NUM_IDS - 1), size=NUM_IDS), ((0, 0), (0, 1)))
    for log_snr, token in itertools.product((4.0, 0.3, -3.0), range(NUM_IDS - 1)):
        point = np.eye(NUM_IDS)[token]
        ends = log_snr + width / 2, log_snr - width / 2
        divergences = kl(law.posterior(point, *ends), law.posterior(model, *ends))
        small_steps = law.marginal(point, ends[1]) @ divergences / width
        assert small_steps == pytest.approx(bound_at(path, model, token, log_snr), rel=2e-4)


def bound_at(path: NoisePath, model: np.ndarray, token: int, log_snr: float) -> float:
    """E over z of w(z, x) (KL + IS), the model's predictions given per z: [N, N]."""
    law = Law(path, NUM_IDS)
    true = law.marginal(np.eye(NUM_IDS)[token], log_snr)
    theirs = law.marginal(model, log_snr)
    ratio = np.divide(true, np.diag(theirs), out=np.ones(NUM_IDS), where=true > 0)
    noisy = torch.arange(NUM_IDS)
    weights = bound_weights(
        levels_at(path, log_snr),
        noisy,
        torch.full_like(noisy, token),
        mask_token_id=NUM_IDS - 1,
        vocab_size=NUM_IDS,
    ).numpy()
    terms = np.where(true > 0, weights * (kl(true, theirs) + ratio - np.log(ratio) - 1), 0)
    return float(true @ terms)
