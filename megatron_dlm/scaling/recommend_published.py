"""Recommendations by the laws of papers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_dlm.scaling.advice import Advice, Question, Recommendation, decades_outside
from megatron_dlm.scaling.conventions import flops_per_token, parameters_of
from megatron_dlm.scaling.published import (
    ANNEALING_GAIN,
    BITS_PER_BYTE,
    CHINCHILLA,
    CHINCHILLA_EXPONENTS,
    CHINCHILLA_RANGE_FLOPS,
    COMPUTE_RANGE_FLOPS,
    HALF_LIFE_EPOCHS,
    LARGE_RUNS,
    NOISE_TYPES,
    best_epochs,
)

_METRICS = ("hellaswag", "mmlu")
_SBD = "SBD, compute-optimal"
_SBD_RANGE = "5e17 to 2e20 FLOPs of fresh web text, five sizes from 25M to 570M"
_QUOKKA = "Quokka, best epochs U^0.39 / N^0.55"
_QUOKKA_RANGE = "one corpus; range not in the sources at hand"


def recommend_diffusion(question: Question, noise: str) -> Recommendation:
    """Compute-optimal by SBD, for as much compute as Quokka's best number of epochs leaves of use.

    Its law counts 6 P + 12 L d S; under 6 P the same runs have less compute.
    """
    law = NOISE_TYPES[noise]

    def spent(compute: float) -> float:
        return _cost(_size(law.flops_per_token(compute)), question) * law.tokens(compute)

    def overfits(compute: float) -> bool:
        limit = best_epochs(_size(law.flops_per_token(compute)), question.unique_tokens)
        return law.tokens(compute) / question.unique_tokens > max(limit, 1.0)

    compute = _solve(spent, question.flops)
    notes, size_law, size_range = [], _SBD, _SBD_RANGE
    if overfits(compute):
        compute = _solve(lambda c: float(overfits(c)), 0.5)
        size_law, size_range = f"{_SBD}, up to {_QUOKKA}", f"{_SBD_RANGE}; {_QUOKKA_RANGE}"
        notes = _surplus(question, _size(law.flops_per_token(compute)), spent(compute))
    outside = decades_outside(compute, *COMPUTE_RANGE_FLOPS)
    parameters = _size(law.flops_per_token(compute))
    tokens = min(spent(compute), question.flops) / _cost(parameters, question)
    numbers = _sizes(question, parameters, tokens, (size_law, size_range, outside))
    epochs = numbers["epochs"].value
    numbers |= _loss(noise, compute, outside, epochs)
    notes += _loss_notes(numbers.get("loss"))
    return Recommendation(noise, numbers, tuple(notes), is_published=True)


def _surplus(question: Question, parameters: float, used: float) -> list[str]:
    """What to do with FLOPs that the data has no use for."""

    def spent(size: float) -> float:
        epochs = best_epochs(size, question.unique_tokens)
        return _cost(size, question) * question.unique_tokens * epochs

    larger = _solve(spent, question.flops, low=parameters)
    notes = [
        f"{used:.3g} of {question.flops:.3g} FLOPs are of use: more epochs than that overfit "
        f"({_QUOKKA})"
    ]
    if larger < 100 * parameters:
        epochs = best_epochs(larger, question.unique_tokens)
        notes.append(
            f"all FLOPs would train {larger:.3g} parameters for their best {epochs:.3g} epochs; no "
            "published law says by how much that is better (SDL: 8B beat 1B on 1B tokens)"
        )
    return notes


def recommend_autoregressive(question: Question) -> Recommendation:
    """Along the line of Chinchilla; its losses are of another text, so none is given."""
    size, tokens_there = CHINCHILLA
    of_size, of_tokens = CHINCHILLA_EXPONENTS
    there = 6 * size * tokens_there

    def plan(compute: float) -> tuple[float, float]:
        return size * (compute / there) ** of_size, tokens_there * (compute / there) ** of_tokens

    def spent(compute: float) -> float:
        parameters, tokens = plan(compute)
        return _cost(parameters, question) * tokens

    compute = _solve(spent, question.flops)
    parameters, tokens = plan(compute)
    outside = decades_outside(compute, *CHINCHILLA_RANGE_FLOPS)
    basis = ("Chinchilla, approach 2", "6e18 to 3e21 FLOPs of fresh web text", outside)
    numbers = _sizes(question, parameters, tokens, basis)
    notes = ["no loss: the published AR laws are of another text and another tokenizer"]
    epochs = tokens / question.unique_tokens
    if epochs > 1:
        worth = 1 + HALF_LIFE_EPOCHS * -np.expm1(-(epochs - 1) / HALF_LIFE_EPOCHS)
        notes.append(
            f"{epochs:.3g} epochs are worth {worth:.3g} epochs of fresh data to AR (Muennighoff et "
            "al. 2023; up to 4 cost next to nothing); SDL's AR runs overfit: keep the best "
            "checkpoint"
        )
    return Recommendation("ar", numbers, tuple(notes), is_published=True)


def _size(per_token: float) -> float:
    """Parameters of so many FLOPs per token as SBD counts them, at its 2048 tokens."""
    return parameters_of(per_token, "six_p_and_attention", 2048)


def _cost(parameters: float, question: Question) -> float:
    return flops_per_token(parameters, question.convention, question.seq_length)


def _solve(spent: Callable[[float], float], flops: float, *, low: float = 1.0) -> float:
    """Where a rising function reaches flops: between low and 1e40, by halving in logarithms."""
    high = 1e40
    for _ in range(64):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if spent(middle) > flops else (middle, high)
    return float(np.sqrt(low * high))


def _sizes(
    question: Question, parameters: float, tokens: float, basis: tuple[str, str, float]
) -> dict[str, Advice]:
    cost = _cost(parameters, question)
    values = {
        "parameters": parameters,
        "flops_per_token": cost,
        "tokens": tokens,
        "epochs": tokens / question.unique_tokens,
    }
    return {name: Advice(value, None, None, *basis) for name, value in values.items()}


def _loss(noise: str, compute: float, outside: float, epochs: float) -> dict[str, Advice]:
    """Only of fresh data: what repeating costs is not published in nats."""
    if epochs > 1:
        return {}
    loss = NOISE_TYPES[noise].loss_nats(compute)
    # No interval is published, but three large runs are: they ended above the law by so much.
    excess = max(run.excess for run in LARGE_RUNS)
    return {"loss": Advice(loss, loss, loss * excess, _SBD, _SBD_RANGE, outside)}


def _loss_notes(loss: Advice | None) -> list[str]:
    if loss is None:
        return [
            "no loss: the plan repeats its data, and the published laws are of fresh data; fit "
            "--law repeated or overfitted to runs of your own"
        ]
    annealed, bits = loss.value / ANNEALING_GAIN, loss.value * BITS_PER_BYTE
    above = sorted(100 * (run.excess - 1) for run in LARGE_RUNS)
    return [
        f"loss in nats per token of SBD's tokenizer before annealing ({bits:.3f} bits per byte); "
        f"annealed {annealed:.3f}, by a gain measured at 25M and 85M parameters; the range up from "
        "it is no 95 % interval: after annealing SBD's 3B and 10B runs ended "
        f"{above[0]:.1f} to {above[-1]:.1f} % above the annealed law"
    ]
