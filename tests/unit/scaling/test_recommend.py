"""Recommendations: published laws by hand, budgets that are spent, conventions, and the choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_dlm.config.parse import PRESETS, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.scaling.advice import Question, decades_outside
from megatron_dlm.scaling.conventions import flops_per_token, parameters_of, width_of
from megatron_dlm.scaling.flops import training_flops
from megatron_dlm.scaling.published import (
    BATCH_TOKENS,
    CROSSOVERS,
    LEARNING_RATE,
    NOISE_TYPES,
    best_epochs,
)
from megatron_dlm.scaling.recommend_published import (
    choose_published,
    crossover_epochs,
    recommend_autoregressive,
    recommend_diffusion,
)

CONVENTIONS = ("six_n", "six_p_and_attention")


def ask(unique: float, flops: float, convention: str = "six_p_and_attention") -> Question:
    return Question(unique, flops, convention, 2048)


@pytest.mark.parametrize("noise", NOISE_TYPES)
def test_fresh_data_is_the_published_law(noise: str) -> None:
    """Its own convention, inside of its range, more data than needed."""
    law, found = NOISE_TYPES[noise], recommend_diffusion(ask(1e13, 1e19), noise).numbers
    assert found["flops_per_token"].value == pytest.approx(law.flops_per_token(1e19), rel=0.01)
    assert found["tokens"].value == pytest.approx(law.tokens(1e19), rel=0.01)
    assert found["parameters"].value == pytest.approx(law.parameters(1e19), rel=0.15)
    assert found["loss"].value == pytest.approx(law.loss_nats(1e19), rel=0.001)
    assert found["loss"].low == found["loss"].value < found["loss"].high
    assert found["batch_tokens"].value == pytest.approx(BATCH_TOKENS(found["tokens"].value))
    assert found["learning_rate"].value == LEARNING_RATE(found["batch_tokens"].value)
    assert {advice.decades for advice in found.values()} == {0.0}


def test_the_large_published_runs() -> None:
    """3B masked at 1e21 FLOPs: 2.04B parameters without embeddings on 73.9B tokens, loss 2.495."""
    found = recommend_diffusion(ask(1e13, 1e21), "masked").numbers
    assert found["parameters"].value == pytest.approx(2.04e9, rel=0.02)
    assert found["tokens"].value == pytest.approx(73.9e9, rel=0.02)
    assert found["loss"].low < 2.495 < found["loss"].high
    assert found["loss"].decades == pytest.approx(np.log10(1e21 / 2e20), rel=1e-3)


@pytest.mark.parametrize(("convention", "unique"), itertools.product(CONVENTIONS, (1e9, 1e12)))
def test_the_budget_is_spent(convention: str, unique: float) -> None:
    question = ask(unique, 3e20, convention)
    for found in (recommend_diffusion(question, "uniform"), recommend_autoregressive(question)):
        numbers = {name: advice.value for name, advice in found.numbers.items()}
        assert numbers["flops_per_token"] * numbers["tokens"] == pytest.approx(3e20, rel=1e-6)
        assert numbers["epochs"] == pytest.approx(numbers["tokens"] / unique)
        cost = flops_per_token(numbers["parameters"], convention, 2048)
        assert numbers["flops_per_token"] == pytest.approx(cost, rel=1e-6)


def test_conventions_are_converted_and_not_mixed() -> None:
    """FLOPs that count no attention are worth more: the same budget trains a larger run."""
    six_n, attention = (
        recommend_diffusion(ask(1e13, 1e19, convention), "masked").numbers
        for convention in CONVENTIONS
    )
    assert six_n["loss"].value < attention["loss"].value
    same = six_n["parameters"].value * six_n["tokens"].value * 6
    assert same == pytest.approx(1e19, rel=1e-6)
    with pytest.raises(AssertionError):
        flops_per_token(1e9, "fine", 2048)


@pytest.mark.parametrize("name", ["gidd_25m", "gidd_570m", "gidd_10b"])
def test_shapes_are_those_of_the_grid(name: str) -> None:
    """Against the accounting of the configurations themselves."""
    size = name.partition("_")[2]
    files = [f"examples/configs/gidd/{part}.yaml" for part in ("base", f"model_{size}")]
    arguments = [word for file in files for word in ("--config", str(PRESETS.parents[2] / file))]
    arguments += ["--model.vocab_size", "1000", "--data.tokenizer", "null"]
    config = parse(RunConfig, arguments, "test")
    parameters = count_parameters(config.model).non_embedding
    counted = training_flops(config.model, config.objective).six_p_and_attention
    assert width_of(parameters) == pytest.approx(config.model.hidden_size, rel=0.01)
    ours = flops_per_token(parameters, "six_p_and_attention", config.model.seq_length)
    assert ours == pytest.approx(counted, rel=0.01)
    assert parameters_of(ours, "six_p_and_attention", 2048) == pytest.approx(parameters, rel=1e-6)


def test_too_many_epochs_are_not_trained() -> None:
    """Quokka's example gives its constant; beyond it the FLOPs are of no use."""
    assert best_epochs(10e9, 1e12) == 1100
    assert best_epochs(20e9, 1e12) == pytest.approx(1100 / 2**0.55)
    assert best_epochs(10e9, 2e12) == pytest.approx(1100 * 2**0.39)
    found = recommend_diffusion(ask(1e9, 1e22), "masked")
    numbers = {name: advice.value for name, advice in found.numbers.items()}
    assert numbers["epochs"] == pytest.approx(best_epochs(numbers["parameters"], 1e9), rel=0.01)
    used = numbers["flops_per_token"] * numbers["tokens"]
    assert used < 0.5e22
    assert f"{used:.3g} of 1e+22 FLOPs are of use" in found.notes[0]
    more = recommend_diffusion(ask(1e9, 1e24), "masked").numbers["parameters"].value
    assert more == pytest.approx(numbers["parameters"], rel=0.01)
    assert "loss" not in found.numbers


@pytest.mark.parametrize("crossing", CROSSOVERS)
@pytest.mark.parametrize("metric", ["hellaswag", "mmlu"])
def test_the_crossings_are_near_what_was_read(crossing: object, metric: str) -> None:
    measured = getattr(crossing, metric)
    found = crossover_epochs(metric, crossing.parameters, crossing.unique_tokens)  # type: ignore[attr-defined]
    assert found.value == pytest.approx(measured, rel=0.7)  # MMLU is noisy
    assert found.low * 0.75 < measured < found.high * 1.25


def test_runs_that_did_not_cross_are_before_the_crossing() -> None:
    assert crossover_epochs("hellaswag", 1e9, 10e9).value > 9.6
    assert crossover_epochs("mmlu", 1e9, 96e9).value > 1


def choice(unique: float, flops: float) -> str | None:
    question = ask(unique, flops)
    diffusion = recommend_diffusion(question, "masked")
    found = choose_published(question, diffusion, recommend_autoregressive(question))
    return found.objective


def test_the_choice() -> None:
    """As SDL: diffusion on 1B tokens at 6e20 FLOPs, AR where data is fresh or repeated little."""
    assert choice(1e9, 6e20) == "masked"
    assert choice(96e9, 6e20) == "ar"
    assert choice(10e9, 6e20) == "ar"
    assert choice(1e9, 3e18) == "ar"


def test_a_guess_says_so() -> None:
    question = ask(1e12, 1e26)
    diffusion = recommend_diffusion(question, "masked")
    found = choose_published(question, diffusion, recommend_autoregressive(question))
    assert any("extrapolated by" in reason and "guess" in reason for reason in found.reasons)
    assert diffusion.numbers["parameters"].decades > 5


def test_distance() -> None:
    assert decades_outside(5.0, 1.0, 10.0) == 0
    assert decades_outside(0.1, 1.0, 10.0) == pytest.approx(1)
    assert decades_outside(1000.0, 1.0, 10.0) == pytest.approx(2)
