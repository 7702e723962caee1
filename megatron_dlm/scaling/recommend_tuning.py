"""Batch size, steps and learning rate of a plan: by files of `scaling fit`, or as published."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.scaling.advice import (
    Advice,
    Recommendation,
    decades_outside,
    is_autoregressive,
)
from megatron_dlm.scaling.published import BATCH_RANGE_TOKENS, BATCH_TOKENS, LEARNING_RATE
from megatron_dlm.scaling.recommend_fitted import NamedFit, advice_of

TUNING = ("batch", "learning_rate")
"""Laws that say how to train, whatever the size."""
_PUBLISHED = "batches of 16k to 1M tokens"


def tuned(recommendation: Recommendation, laws: Sequence[NamedFit]) -> Recommendation:
    """With batch, steps and rate; each by the law of a file that knows the objective, if any."""
    tokens = recommendation.numbers["tokens"].value
    of_batch = tuning_law(laws, "batch", recommendation.objective)
    of_rate = tuning_law(laws, "learning_rate", recommendation.objective)
    batch = _published_batch(tokens) if of_batch is None else _by(of_batch, "tokens", tokens)
    steps = tokens / batch.value
    numbers = {
        "batch_tokens": batch,
        "steps": Advice(steps, None, None, batch.law, batch.measured, batch.decades),
        "learning_rate": _published_rate(batch.value)
        if of_rate is None
        else _by(of_rate, "batch_tokens", batch.value),
    }
    notes = []
    if is_autoregressive(recommendation.objective) and (of_batch is None or of_rate is None):
        notes.append(
            "the published laws of batch and rate are of diffusion; Quokka found that they carry "
            "over"
        )
    return recommendation.with_numbers(numbers, *notes)


def tuning_law(laws: Sequence[NamedFit], kind: str, objective: str) -> NamedFit | None:
    """The law of this objective, else the one that was fitted to all runs of its tables."""
    of_kind = {law.label: law for law in laws if law.file.law == kind}
    return of_kind.get(objective) or of_kind.get("")


def _by(law: NamedFit, axis: str, x: float) -> Advice:
    drawn = law.fit.drawn[:, 0] * x ** law.fit.drawn[:, 1]
    value = law.fit["coefficient"] * x ** law.fit["exponent"]
    return advice_of(law, value, drawn, law.outside(**{axis: x}))


def _published_batch(tokens: float) -> Advice:
    batch = BATCH_TOKENS(tokens)
    outside = decades_outside(batch, *BATCH_RANGE_TOKENS)
    law = "SBD, batch by tokens, over all noise types"
    return Advice(batch, None, None, law, _PUBLISHED, outside)


def _published_rate(batch: float) -> Advice:
    outside = decades_outside(batch, *BATCH_RANGE_TOKENS)
    law = "SBD, base rate of CompleteP with LaProp by batch"
    return Advice(LEARNING_RATE(batch), None, None, law, _PUBLISHED, outside)
