"""The masked bound by enumeration: 3 text tokens and the mask, 2 slots, a table as the model.

The reference enumerates every sequence and every corruption in float64. Its three forms of the
bound agree to rounding; prepare + loss averaged over many stratified steps have to converge to it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from estimates import Estimate, ratio_estimate

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.schedules import build_schedule
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

NUM_TOKENS, MASK_ID, VOCAB_SIZE = 3, 3, 4
SEQUENCES = list(itertools.product(range(NUM_TOKENS), repeat=2))
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def integrate(function, low: float, high: float) -> float:
    """Gauss-Legendre quadrature, exact for polynomials far beyond the degree used here."""
    points = (high - low) / 2 * NODES + (high + low) / 2
    return float((high - low) / 2 * sum(NODE_WEIGHTS * [function(t) for t in points]))


@dataclass(frozen=True)
class Enumeration:
    """log_probs[x0, x1, slot, v] of the model on any input, and the probability of each text."""

    log_probs: np.ndarray
    text: dict[tuple[int, int], float]

    def nll(self, sequence: tuple[int, int], masked: tuple[int, ...]) -> float:
        """Summed cross entropy of the masked slots, nats."""
        noisy = tuple(MASK_ID if slot in masked else sequence[slot] for slot in (0, 1))
        return -sum(self.log_probs[(*noisy, slot, sequence[slot])] for slot in masked)

    def average(self, per_sequence) -> float:
        return sum(share * per_sequence(sequence) for sequence, share in self.text.items())

    def mean_nll(self, rate: float) -> float:
        """E[summed CE of masked tokens] / (l * rate) when each token is masked with this rate."""

        def of(sequence: tuple[int, int]) -> float:
            one = self.nll(sequence, (0,)) + self.nll(sequence, (1,))
            return (1 - rate) * one + rate * self.nll(sequence, (0, 1))

        return self.average(of) / 2

    def time_form(self) -> float:
        """1/l times the integral over t of 1/t E[CE of the masked tokens]."""
        return integrate(self.mean_nll, 0.0, 1.0)

    def count_form(self) -> float:
        """Average over n = 1..l and over all n-subsets of the mean CE of the subset."""

        def of(sequence: tuple[int, int]) -> float:
            one = (self.nll(sequence, (0,)) + self.nll(sequence, (1,))) / 2
            return (one + self.nll(sequence, (0, 1)) / 2) / 2

        return self.average(of)

    def any_order_form(self) -> float:
        """Average over the orders of the slots of the chain-rule NLL, per token."""

        def of(sequence: tuple[int, int]) -> float:
            total = 0.0
            for first, second in ((0, 1), (1, 0)):
                both = -self.log_probs[MASK_ID, MASK_ID, first, sequence[first]]
                total += (both + self.nll(sequence, (second,))) / 2
            return total / 2

        return self.average(of)

    def bound_above(self, time_floor: float, schedule: str) -> float:
        """The bound averaged over the mask rates that times above the floor reach."""
        floor = torch.tensor(time_floor, dtype=torch.float64)
        lowest = build_schedule(schedule, 2.0).mask_rate(floor).item()
        return integrate(self.mean_nll, lowest, 1.0) / (1 - lowest)

    def unweighted(self, time_floor: float, schedule: str) -> float:
        """Integral of rate(t) * mean CE(rate(t)) over the drawn times."""
        mask_rate = build_schedule(schedule, 2.0).mask_rate

        def at(time: float) -> float:
            rate = mask_rate(torch.tensor(time, dtype=torch.float64)).item()
            return rate * self.mean_nll(rate)

        return integrate(at, time_floor, 1.0) / (1 - time_floor)

    def maskgit(self, time_floor: float, schedule: str) -> float:
        """The unweighted integral over the mean mask rate: 2 * integral t * mean CE if linear."""
        unit = Enumeration(-np.ones_like(self.log_probs), self.text)
        return self.unweighted(time_floor, schedule) / unit.unweighted(time_floor, schedule)


def random_table(seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(4, 4, 2, VOCAB_SIZE)) * 1.5
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def uniform_text() -> dict[tuple[int, int], float]:
    return dict.fromkeys(SEQUENCES, 1 / 9)


def estimate(
    config: ObjectiveConfig, log_probs: np.ndarray, texts: list[tuple[int, int]] = SEQUENCES
) -> dict[str, Estimate]:
    """Every metric over 150 steps of 300 rounds through the texts."""
    num_steps, batch_size = 150, 300 * len(texts)
    objective = build_objective(
        config,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=batch_size,
        training=True,
    )
    tokens = torch.tensor([(*text, 0) for text in texts]).repeat(300, 1)
    table = torch.from_numpy(log_probs).float()
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in objective.metric_names}
    for step in range(num_steps):
        # Shuffled, so that a text does not meet the same strata of the time in every step.
        shuffled = tokens[torch.randperm(batch_size, generator=torch.Generator().manual_seed(step))]
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        batch = TokenBatch(shuffled, torch.ones_like(shuffled, dtype=torch.bool), index)
        inputs = objective.prepare(batch, 17, Stream.TRAINING)
        logits = table[inputs.tokens[:, 0], inputs.tokens[:, 1]]
        terms = micro_batch_loss(objective, logits[inputs.scored], inputs, None)
        for name, (total, count) in terms.metrics.items():
            sums[name].append((total.item(), count.item()))
    return {name: ratio_estimate(np.array(pairs)) for name, pairs in sums.items()}


def test_three_forms_of_the_bound_agree() -> None:
    for seed in range(5):
        shares = np.random.default_rng(100 + seed).dirichlet(np.ones(9))
        exact = Enumeration(random_table(seed), dict(zip(SEQUENCES, shares, strict=True)))
        assert exact.count_form() == pytest.approx(exact.time_form(), abs=1e-12)
        assert exact.any_order_form() == pytest.approx(exact.time_form(), abs=1e-12)


@pytest.mark.parametrize("time_sampling", ["stratified", "iid"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_elbo_converges_to_the_bound_for_every_schedule(schedule: str, time_sampling: str) -> None:
    exact = Enumeration(random_table(), uniform_text())
    config = ObjectiveConfig(schedule=schedule, time_sampling=time_sampling)
    found = estimate(config, exact.log_probs)
    assert found["loss"] == found["nelbo"]
    found["nelbo"].agrees_with(exact.bound_above(1e-3, schedule), resolution=0.01)
    # The floor moves the bound by less than its own size.
    assert exact.bound_above(1e-3, schedule) == pytest.approx(exact.time_form(), abs=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_a_high_time_floor_averages_over_the_mask_rates_above_it(schedule: str) -> None:
    exact = Enumeration(random_table(1), uniform_text())
    expected = exact.bound_above(0.4, schedule)
    found = estimate(ObjectiveConfig(schedule=schedule, time_floor=0.4), exact.log_probs)
    found["nelbo"].agrees_with(expected, resolution=0.006)


@pytest.mark.parametrize("time_sampling", ["stratified", "iid"])
def test_count_form_converges_to_the_bound(time_sampling: str) -> None:
    exact = Enumeration(random_table(), uniform_text())
    config = ObjectiveConfig(weighting="count", time_sampling=time_sampling)
    found = estimate(config, exact.log_probs)
    assert found["loss"] == found["nelbo"]
    found["nelbo"].agrees_with(exact.time_form(), resolution=0.005)


def test_count_form_has_less_variance() -> None:
    table = random_table()
    errors = {
        weighting: estimate(ObjectiveConfig(weighting=weighting), table)["nelbo"].standard_error
        for weighting in ("elbo", "count")
    }
    assert errors["count"] < 0.7 * errors["elbo"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("weighting", ["unweighted", "maskgit"])
def test_surrogates_converge_to_their_integrals(weighting: str, schedule: str) -> None:
    exact = Enumeration(random_table(), uniform_text())
    found = estimate(ObjectiveConfig(weighting=weighting, schedule=schedule), exact.log_probs)
    expected = getattr(exact, weighting)(1e-3, schedule)
    found["loss"].agrees_with(expected, resolution=0.005)
    found["nelbo"].agrees_with(exact.bound_above(1e-3, schedule), resolution=0.01)
    found["masked_nll"].agrees_with(exact.maskgit(1e-3, schedule), resolution=0.005)
    if schedule == "linear":
        times_nll = integrate(lambda t: t * exact.mean_nll(t), 0.0, 1.0)
        factor = {"unweighted": 1, "maskgit": 2}[weighting]
        assert expected == pytest.approx(factor * times_nll, abs=3e-3)


def test_uniform_predictor() -> None:
    """The bound gives ln V (the count form sample by sample), the unweighted loss half of it."""
    table = np.full((4, 4, 2, VOCAB_SIZE), -math.log(VOCAB_SIZE))
    log_vocab = math.log(VOCAB_SIZE)
    count = estimate(ObjectiveConfig(weighting="count"), table)["nelbo"]
    assert count.mean == pytest.approx(log_vocab, rel=1e-6)
    assert count.standard_error < 1e-6
    for schedule in ("linear", "cosine", "polynomial"):
        found = estimate(ObjectiveConfig(schedule=schedule), table)
        found["nelbo"].agrees_with(log_vocab, resolution=0.01)
    floor = 1e-3
    found = estimate(ObjectiveConfig(weighting="unweighted", time_floor=floor), table)
    found["loss"].agrees_with((1 + floor) / 2 * log_vocab, resolution=0.005)
    maskgit = estimate(ObjectiveConfig(weighting="maskgit"), table)["loss"]
    assert maskgit.mean == pytest.approx(log_vocab, rel=1e-6)


INDEPENDENT = (0.5, 0.25, 0.25)
INDEPENDENT_TEXTS = list(itertools.product((0, 0, 1, 2), repeat=2))
ENTROPY = -sum(share * math.log(share) for share in INDEPENDENT)


def independent_table(log_weights: torch.Tensor) -> torch.Tensor:
    """The model that predicts the same distribution everywhere, never the mask."""
    logits = torch.cat((log_weights, torch.full((1,), -torch.inf, dtype=log_weights.dtype)))
    return logits.log_softmax(0).expand(4, 4, 2, VOCAB_SIZE)


@pytest.mark.parametrize("weighting", ["elbo", "count"])
def test_optimum_for_independent_tokens_is_their_entropy(weighting: str) -> None:
    best = independent_table(torch.tensor(INDEPENDENT, dtype=torch.float64).log())
    text = {text: INDEPENDENT[text[0]] * INDEPENDENT[text[1]] for text in SEQUENCES}
    assert Enumeration(best.numpy(), text).time_form() == pytest.approx(ENTROPY, abs=1e-12)
    config = ObjectiveConfig(weighting=weighting)
    at_best = estimate(config, best.numpy(), INDEPENDENT_TEXTS)["nelbo"]
    at_best.agrees_with(ENTROPY, resolution=0.01)
    for shift in ([0.3, 0.0, 0.0], [0.0, -0.3, 0.0]):
        weights = torch.tensor(INDEPENDENT, dtype=torch.float64).log() + torch.tensor(shift)
        worse = estimate(config, independent_table(weights).numpy(), INDEPENDENT_TEXTS)["nelbo"]
        assert worse.mean > at_best.mean  # same noise: no sampling error between the two


@pytest.mark.parametrize("weighting", ["elbo", "count", "unweighted", "maskgit"])
def test_gradient_vanishes_at_the_optimum(weighting: str) -> None:
    """Every weighting is proper: the true conditionals are stationary."""
    rounds = 2000
    objective = build_objective(
        ObjectiveConfig(weighting=weighting),
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=rounds * len(INDEPENDENT_TEXTS),
        training=True,
    )
    tokens = torch.tensor([(*text, 0) for text in INDEPENDENT_TEXTS]).repeat(rounds, 1)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    batch = TokenBatch(tokens, valid, torch.arange(len(tokens)))
    inputs = objective.prepare(batch, 3, Stream.TRAINING)
    log_weights = torch.tensor(INDEPENDENT).log().requires_grad_()
    table = independent_table(log_weights)
    logits = table[inputs.tokens[:, 0], inputs.tokens[:, 1]]
    terms = micro_batch_loss(objective, logits[inputs.scored], inputs, None)
    (terms.loss_sum / terms.token_count).backward()
    assert log_weights.grad is not None
    squared_weights = inputs.weights.double().square().sum().item()
    standard_error = 0.5 * math.sqrt(squared_weights) / int(terms.token_count)
    assert standard_error < 0.01
    assert log_weights.grad.abs().max().item() < 4 * standard_error


def true_conditionals(text: dict[tuple[int, int], float]) -> np.ndarray:
    """The best possible table: p(token of the slot | the visible tokens)."""
    table = np.full((4, 4, 2, VOCAB_SIZE), -np.inf)
    for first, second, slot in itertools.product(range(4), range(4), (0, 1)):
        shares = np.zeros(VOCAB_SIZE)
        for sequence, share in text.items():
            other = (first, second)[1 - slot]
            if other in (MASK_ID, sequence[1 - slot]):
                shares[sequence[slot]] += share
        with np.errstate(divide="ignore"):
            table[first, second, slot] = np.log(shares / shares.sum())
    return table


def test_the_bound_lies_above_the_entropy_and_reaches_it() -> None:
    for seed in range(5):
        shares = np.random.default_rng(seed).dirichlet(np.ones(9))
        text = dict(zip(SEQUENCES, shares, strict=True))
        entropy = -float((shares * np.log(shares)).sum()) / 2
        best = Enumeration(true_conditionals(text), text).time_form()
        assert best == pytest.approx(entropy, abs=1e-12)
        assert Enumeration(random_table(seed), text).time_form() > entropy


def test_prepare_and_loss_reach_the_entropy_of_dependent_text() -> None:
    """Second token follows the first: only a model that looks at its context gets there."""
    texts = [(0, 1), (0, 1), (1, 2), (2, 0), (2, 2), (0, 0)]
    text = {sequence: texts.count(sequence) / len(texts) for sequence in set(texts)}
    entropy = -sum(share * math.log(share) for share in text.values()) / 2
    table = np.nan_to_num(true_conditionals(text), neginf=-100.0)
    for weighting in ("elbo", "count"):
        found = estimate(ObjectiveConfig(weighting=weighting), table, texts)
        found["nelbo"].agrees_with(entropy, resolution=0.01)
