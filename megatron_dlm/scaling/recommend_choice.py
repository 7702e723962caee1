"""AR or diffusion: by laws of one's own, and by the published crossings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dlm.scaling.advice import (
    Choice,
    Question,
    Recommendation,
    decades_outside,
    is_autoregressive,
)
from megatron_dlm.scaling.bootstrap import Estimate, Floats, spread_residuals, wild_factors
from megatron_dlm.scaling.published import CROSSOVERS, NOT_CROSSED, PublishedCrossover
from megatron_dlm.scaling.recommend_fitted import SLACK
from megatron_dlm.scaling.recommend_limits import FARTHEST_DECADES

_METRICS = ("hellaswag", "mmlu")


def choose_fitted(recommendations: Sequence[Recommendation]) -> Choice | None:
    """The lowest expected loss, where intervals do not overlap; None with fewer than two of them.

    Nothing is chosen where a plan has more epochs than its law was measured on, nor where AR is
    the lower one: the loss of diffusion is a bound.
    """
    if len(recommendations) < 2:
        return None
    open_questions = _without_a_loss(recommendations)
    if open_questions:
        return Choice(None, open_questions)
    ordered = sorted(recommendations, key=lambda each: each.numbers["loss"].value)
    lowest = ordered[0]
    texts, near = [], []
    for each in ordered:
        loss = each.numbers["loss"]
        assert loss.low is not None
        texts.append(f"{loss.value:.4g} ({loss.low:.4g} to {loss.high:.4g}) of {each.objective}")
        if each is not lowest and loss.low <= (lowest.numbers["loss"].high or 0.0):
            near.append(each.objective)
    reasons = [f"expected loss {' against '.join(texts)}"]
    if near:
        reasons.append(f"the intervals of {lowest.objective} and {', '.join(near)} overlap")
    are_exact = {is_autoregressive(each.objective) for each in ordered}
    if are_exact == {True, False}:
        reasons.append(
            "the loss of diffusion is a bound: where it is the lower one diffusion is better, the "
            "other way round need not hold"
        )
    proves_nothing = len(are_exact) == 2 and is_autoregressive(lowest.objective)
    return Choice(None if near or proves_nothing else lowest.objective, tuple(reasons))


def _without_a_loss(recommendations: Sequence[Recommendation]) -> tuple[str, ...]:
    """A reason for every plan that its law cannot judge."""
    found = []
    for each in recommendations:
        epochs, seen = each.numbers.get("epochs"), each.measured_epochs
        assert seen is not None
        if epochs is None:
            found.append(f"the plan of {each.objective} is out of reach of its law")
        elif epochs.value > seen * SLACK:
            found.append(
                f"the plan of {each.objective} has {epochs.value:.3g} epochs, and its law was "
                f"measured on up to {seen:.3g}: its loss there decides nothing"
            )
    return tuple(found)


def choose_published(question: Question, diffusion: Recommendation) -> Choice:
    """By SDL's runs: is the plan of diffusion longer than it took to overtake AR?"""
    epochs = diffusion.numbers["epochs"].value
    parameters = diffusion.numbers["parameters"].value
    found = _never_crossed(question, parameters, epochs)
    if found is not None:
        return found
    decades = decades_outside(question.unique_tokens, 0.5e9, 1.5e9)
    decades += decades_outside(parameters, 1e9, 8e9)
    farthest = max(decades, diffusion.numbers["parameters"].decades)
    if farthest > FARTHEST_DECADES:
        return Choice(None, (f"{farthest:.3g} decades from all that was measured: no guess",))
    reasons = []
    verdicts = set()
    for metric in _METRICS:
        crossing = crossover_epochs(metric, parameters, question.unique_tokens)
        is_past, is_before = epochs > crossing.high, epochs < crossing.low
        verdicts.add(diffusion.objective if is_past else "ar" if is_before else None)
        reasons.append(
            f"{metric}: SDL's crossings put the overtaking of {parameters:.2g} parameters on "
            f"{question.unique_tokens:.2g} unique tokens at {crossing.value:.3g} epochs "
            f"({crossing.low:.3g} to {crossing.high:.3g}); the plan has {epochs:.3g}"
        )
    verdict = verdicts.pop() if len(verdicts) == 1 else None
    return Choice(verdict, (*reasons, *_caveats(decades)))


def _never_crossed(question: Question, parameters: float, epochs: float) -> Choice | None:
    """AR on fresh data, and where even more favourable runs of SDL did not cross."""
    if epochs <= 1:
        reason = (
            f"{question.unique_tokens:.3g} unique tokens are enough for one epoch: on fresh data "
            "AR was better throughout (SDL, 1B parameters on 96B tokens: HellaSwag 58.6 against "
            "48.3; none of the 10B x 9.6 and 96B x 1 runs crossed)"
        )
        return Choice("ar", (reason,))
    for size, unique, longest in NOT_CROSSED:
        if parameters <= size and question.unique_tokens >= unique and epochs <= longest:
            reason = (
                f"{size:.2g} parameters on {unique:.2g} unique tokens did not overtake AR in "
                f"{longest:g} epochs (SDL), and smaller models and more data cross later; the plan "
                f"has {parameters:.2g} parameters and {epochs:.3g} epochs"
            )
            return Choice("ar", (reason,))
    return None


def _caveats(decades: float) -> list[str]:
    """What to think of the crossings; decades: how far the question is from all of them."""
    found = []
    if decades > 0.05:
        found.append(
            "measured on 0.5B to 1.5B unique tokens and 1B to 8B parameters: extrapolated by "
            f"{decades:.1f} decades in all, so take it as a guess"
        )
    ranges = ", ".join(
        f"{each.mmlu_range[0]:g} to {each.mmlu_range[1]:g} on {each.unique_tokens / 1e9:g}B tokens"
        for each in CROSSOVERS
        if each.mmlu_range
    )
    found.append(f"MMLU is read off noisy curves: epochs {ranges}, the last of which is a tie")
    found.append(
        "a crossing compares final models of one size on equal FLOPs; AR stopped at its best "
        "epoch, or of another size, is not compared"
    )
    return found


def crossover_epochs(
    metric: str,
    parameters: float,
    unique_tokens: float,
    crossings: Sequence[PublishedCrossover] = CROSSOVERS,
) -> Estimate:
    """log epochs = a of the metric + b log U + c log N, through the crossings on both metrics.

    95 % by a wild bootstrap over pairs of runs, whose metrics err together: the mean of both
    metrics is a plane in log U and log N, half of their difference a constant, and the residuals
    of both come back with one factor of the pair.
    """
    read = np.log([[getattr(each, name) for name in _METRICS] for each in crossings])
    places = [(each.parameters, each.unique_tokens) for each in crossings]
    design = np.array([_row(*place) for place in places])
    spare = len(crossings) - design.shape[1]
    factors = wild_factors(range(len(crossings)), spare, 1000, 0)
    sign = 1.0 if metric == _METRICS[0] else -1.0
    constant = np.ones((len(crossings), 1))
    mean, drawn_mean = _predicted(
        design, read.mean(axis=1), _row(parameters, unique_tokens), factors
    )
    half, drawn_half = _predicted(constant, (read[:, 0] - read[:, 1]) / 2, [1.0], factors)
    low, high = np.quantile(drawn_mean + sign * drawn_half, [0.025, 0.975])
    return Estimate(*(float(np.exp(value)) for value in (mean + sign * half, low, high)))


def _predicted(
    design: Floats, targets: Floats, at: Sequence[float], factors: Floats
) -> tuple[float, Floats]:
    """Least squares at a place: the value, and those of resamples with factors [resamples, n]."""
    solve = np.linalg.pinv(design)
    fitted = design @ (solve @ targets)
    weights = np.array(at) @ solve
    drawn: Floats = (fitted + factors * spread_residuals(design, targets - fitted)) @ weights
    return float(targets @ weights), drawn


def _row(parameters: float, unique_tokens: float) -> list[float]:
    """1, log(U / 1B), log(N / 1B)."""
    return [1.0, float(np.log(unique_tokens / 1e9)), float(np.log(parameters / 1e9))]
