"""The hybrid bound by enumeration: 3 text tokens and the mask, 2 slots, a table as the model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from estimates import Estimate, ratio_estimate
from hybrid_law import PATHS, TYPES, Law, integrate, kl
from torch import Tensor

from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.hybrid import HybridObjective, HybridWeighting
from megatron_dlm.objectives.noise import NoiseLevels, NoisePath, SigmoidNoise
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

NUM_TEXT, MASK_ID, NUM_IDS = 3, 3, 4
SEQUENCES = list(itertools.product(range(NUM_TEXT), repeat=2))
TOY = np.array([0.5, 0.25, 0.15, 0.1])
REACHED = {
    "masked": 1.2077, "low_uniform": 1.2069, "balanced": 1.2069, "high_uniform": 1.2070,
    "uniform": 1.2070,
}  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """w KL and w IS, summed over the slots of a text, averaged over its noise; [texts]."""

    kl: np.ndarray
    itakura_saito: np.ndarray


def terms_at(path: NoisePath, table: np.ndarray, log_snr: float) -> Terms:
    """table[z0, z1, slot, v]: probabilities, 0 for the mask."""
    law = Law(path, NUM_IDS)
    true, weights = law.marginal(np.eye(NUM_IDS), log_snr), law.weights(log_snr)
    theirs = law.marginal(table, log_snr)
    found = np.zeros((2, len(SEQUENCES)))
    for number, text in enumerate(SEQUENCES):
        for noisy in itertools.product(range(NUM_IDS), repeat=2):
            chance = true[text[0], noisy[0]] * true[text[1], noisy[1]]
            if chance == 0:
                continue
            for slot in (0, 1):
                x, z = text[slot], noisy[slot]
                ratio = true[x, z] / theirs[(*noisy, slot, z)]
                divergences = kl(true[x], theirs[(*noisy, slot)]), ratio - np.log(ratio) - 1
                found[:, number] += chance * weights[x, z] * np.array(divergences)
    return Terms(*found)


def random_table(seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(4, 4, 2, NUM_TEXT)) * 1.5
    table = np.exp(logits)
    return np.pad(table / table.sum(-1, keepdims=True), ((0, 0),) * 3 + ((0, 1),))


def mean_terms(path: NoisePath, table: np.ndarray) -> tuple[float, float]:
    """KL and IS part of the bound per token, over texts of equal probability."""

    def part(name: str) -> float:
        return integrate(lambda level: getattr(terms_at(path, table, level), name).mean() / 2)

    return part("kl"), part("itakura_saito")


def objective_of(path: NoisePath, batch_size: int, weighting: HybridWeighting) -> HybridObjective:
    return HybridObjective(NUM_IDS, MASK_ID, path, batch_size, weighting)


def estimate(
    path: NoisePath, table: np.ndarray, weighting: HybridWeighting = "elbo"
) -> dict[str, Estimate]:
    """Every metric over 120 steps of 200 rounds through the texts."""
    batch_size = 200 * len(SEQUENCES)
    objective = objective_of(path, batch_size, weighting)
    tokens = torch.tensor([(*text, 0) for text in SEQUENCES]).repeat(200, 1)
    # The logit of the mask must not matter.
    logits = torch.from_numpy(np.log(table + np.eye(NUM_IDS)[MASK_ID] * 5)).float()
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in objective.metric_names}
    for step in range(120):
        shuffled = tokens[torch.randperm(batch_size, generator=torch.Generator().manual_seed(step))]
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        batch = TokenBatch(shuffled, torch.ones_like(shuffled, dtype=torch.bool), index)
        inputs = objective.prepare(batch, 17, Stream.TRAINING)
        rows = logits[inputs.tokens[:, 0], inputs.tokens[:, 1]]
        found = micro_batch_loss(objective, rows[inputs.scored], inputs, None)
        for name, (total, count) in found.metrics.items():
            sums[name].append((total.item(), count.item()))
    return {name: ratio_estimate(np.array(pairs)) for name, pairs in sums.items()}


@pytest.mark.parametrize("name", ["masked", "balanced", "uniform", "slow"])
def test_prepare_and_loss_converge_to_the_bound(name: str) -> None:
    path, table = PATHS[name], random_table()
    divergence, itakura_saito = mean_terms(path, table)
    found = estimate(path, table)
    assert found["loss"] == found["nelbo"]
    found["kl"].agrees_with(divergence, resolution=0.01)
    found["itakura_saito"].agrees_with(itakura_saito, resolution=0.01)
    found["nelbo"].agrees_with(divergence + itakura_saito, resolution=0.02)
    assert found["kl"].mean + found["itakura_saito"].mean == pytest.approx(found["nelbo"].mean)
    assert (itakura_saito > 0.01) == (name != "masked")


def test_the_time_form_converges_to_its_bound() -> None:
    path, table = PATHS["time 0.2"], random_table(1)
    ends = path.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).log_snr.tolist()
    found = estimate(path, table)

    def at(level: float) -> float:
        terms = terms_at(path, table, level)
        return (terms.kl + terms.itakura_saito).mean() / 2

    found["nelbo"].agrees_with(integrate(at, ends[1], ends[0]), resolution=0.02)


@dataclass(frozen=True)
class FlatNoise(SigmoidNoise):
    """The same noise looked at with another law: l uniform on [-9, 9]."""

    def at(self, draw: Tensor) -> NoiseLevels:
        log_snr = 9.0 - 18.0 * draw
        return NoiseLevels(log_snr, *self.mixing(log_snr), torch.full_like(draw, 1 / 18))


@pytest.mark.parametrize("bias", [-1000.0, 0.0])
def test_the_bound_does_not_depend_on_where_training_looks(bias: float) -> None:
    table = random_table(2)
    exact = sum(mean_terms(SigmoidNoise(1.0, bias), table))
    for path in (SigmoidNoise(1.0, bias), FlatNoise(1.0, bias)):
        estimate(path, table)["nelbo"].agrees_with(exact, resolution=0.02)


def test_the_surrogate_is_the_bound_without_its_density() -> None:
    path, table = PATHS["balanced"], random_table(3)
    length = 1 - 2 / (1 + np.exp(9))

    def at(level: float) -> float:
        density = 1 / (1 + np.exp(level)) / (1 + np.exp(-level)) / length
        terms = terms_at(path, table, level)
        return density * (terms.kl + terms.itakura_saito).mean() / 2

    found = estimate(path, table, "surrogate")
    found["loss"].agrees_with(integrate(at), resolution=0.005)
    found["nelbo"].agrees_with(sum(mean_terms(path, table)), resolution=0.02)


@pytest.mark.parametrize("name", TYPES)
def test_every_noise_type_reaches_the_entropy(name: str) -> None:
    """One token of known law. The best prediction is this law, whatever its noisy value: q(.|model)
    itself adds what that value says. What is left to the entropy is truncation."""
    law, entropy = Law(PATHS[name], 5), -float(TOY @ np.log(TOY))
    assert entropy == pytest.approx(1.20797, abs=1e-5)

    def bound(shares: np.ndarray) -> float:
        def at(level: float) -> float:
            true, weights = law.marginal(np.eye(5), level), law.weights(level)
            theirs, total = law.marginal(np.append(shares / shares.sum(), 0.0), level), 0.0
            for x, z in itertools.product(range(4), range(5)):
                if true[x, z] > 0:
                    ratio = true[x, z] / theirs[z]
                    cost = kl(true[x], theirs) + ratio - np.log(ratio) - 1
                    total += TOY[x] * true[x, z] * weights[x, z] * cost
            return total

        return integrate(at)

    reached = bound(TOY)
    assert reached == pytest.approx(REACHED[name], abs=1e-4)
    for warp in ([1.1, 1, 1, 1], [1, 0.9, 1, 1], [1, 1, 1, 1.2]):
        assert bound(TOY * np.array(warp)) > reached + 1e-4


@pytest.mark.parametrize("name", TYPES)
def test_prepare_and_loss_reach_the_entropy_with_the_best_model(name: str) -> None:
    batch_size, num_slots = 256, 40
    objective = HybridObjective(5, 4, PATHS[name], batch_size)
    text = torch.tensor([0] * 20 + [1] * 10 + [2] * 6 + [3] * 4 + [0]).repeat(batch_size, 1)
    logits = torch.from_numpy(np.append(np.log(TOY), 3.0)).float()  # that of the mask is not seen
    pairs = []
    for step in range(40):
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        batch = TokenBatch(text, torch.ones_like(text, dtype=torch.bool), index)
        inputs = objective.prepare(batch, 1, Stream.TRAINING)
        rows = logits.repeat(int(inputs.scored.sum()), 1)
        total, count = micro_batch_loss(objective, rows, inputs, None).metrics["nelbo"]
        assert count == batch_size * num_slots
        pairs.append((total.item(), count.item()))
    ratio_estimate(np.array(pairs)).agrees_with(REACHED[name], resolution=0.02)


@pytest.mark.parametrize("name", ["masked", "low_uniform", "balanced", "uniform", "time 0.2"])
def test_the_bound_is_above_what_the_model_really_says(name: str) -> None:
    """-log p(text) of the reverse process in 400 steps, against prior + integral + last step."""
    path, low, high = PATHS[name], -8.5, 8.5
    law, table = Law(path, NUM_IDS), random_table(4)
    levels = np.linspace(high, low, 401)
    prior = law.marginal(np.append(np.full(NUM_TEXT, 1 / NUM_TEXT), 0.0), low)
    state = np.outer(prior, prior)
    for clean, noisy in reversed(list(itertools.pairwise(levels))):
        steps = reverse_steps(law, table, clean, noisy)
        state = np.einsum("ab,abc,abd->cd", state, steps[:, :, 0], steps[:, :, 1])
    assert state.sum() == pytest.approx(1)
    last = last_step(law, table, high)
    probability = np.einsum("ab,abc,abd->cd", state, last[:, :, 0], last[:, :, 1])
    exact = np.array([-np.log(probability[text]) for text in SEQUENCES])

    at_low, at_high = (law.marginal(np.eye(NUM_IDS), level) for level in (low, high))
    ends = []
    for first, second in SEQUENCES:
        chance = np.outer(at_high[first], at_high[second])
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = -np.log(last[:, :, 0, first] * last[:, :, 1, second])
            ends.append(np.where(chance > 0, chance * cost, 0.0).sum())
        ends[-1] += kl(at_low[[first, second]], prior).sum()
    assert max(ends) < 0.02

    def between(level: float) -> np.ndarray:
        terms = terms_at(path, table, level)
        return terms.kl + terms.itakura_saito

    bound = integrate(between, low, high)
    assert np.all(bound + ends > exact - 2e-3)
    assert np.all(bound < 4 * exact)


def reverse_steps(law: Law, table: np.ndarray, clean: float, noisy: float) -> np.ndarray:
    """p(cleaner id of a slot | noisy pair): [z0, z1, slot, id]."""
    steps = np.empty((NUM_IDS, NUM_IDS, 2, NUM_IDS))
    for pair in itertools.product(range(NUM_IDS), repeat=2):
        for slot in (0, 1):
            model = table[(*pair, slot)]
            steps[(*pair, slot)] = law.posterior(model, clean, noisy)[pair[slot]]
    return steps


def last_step(law: Law, table: np.ndarray, log_snr: float) -> np.ndarray:
    """p(text id of a slot | almost clean pair), by Bayes' rule: [z0, z1, slot, id]."""
    likelihood = law.marginal(np.eye(NUM_IDS), log_snr)  # [x, z]
    joint = table.copy()
    joint[:, :, 0] *= likelihood.T[:, None]
    joint[:, :, 1] *= likelihood.T[None, :]
    total = joint.sum(-1, keepdims=True)
    return np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
