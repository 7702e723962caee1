"""Data potential from final scores: how many times less unique data one kind needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.crossings import ends_by_rank
from megatron_dlm.scaling.figures.drawn import in_short

Scores = Mapping[float, Sequence[float]]
"""Unique tokens -> the score of every seed."""
_RESAMPLES = 400


@dataclass(frozen=True)
class Potential:
    """Of the second kind against the first, at one number of unique tokens."""

    ratio: Estimate
    """Data that the first needs for the second's score, over the data the second has; infinite
    where more than was trained, 0 where less: then only a bound is known."""
    at_least: float
    """The most that the trained budgets can show: a ratio of infinity is more than this."""
    at_most: float
    """The least that they can show: a ratio of 0 is less than this."""

    def __str__(self) -> str:
        value, low, high = (self._in_words(x) for x in _numbers(self.ratio))
        return value if low == high else f"{value} [{low}, {high}]"

    def _in_words(self, ratio: float) -> str:
        if np.isinf(ratio):
            return f"> {in_short(self.at_least)}"
        return f"< {in_short(self.at_most)}" if ratio == 0 else in_short(ratio)


def potential_at(
    first: Scores, second: Scores, tokens: float, *, higher_is_better: bool = False
) -> Potential:
    """The data potential of the second kind at `tokens`, a budget of its own.

    Between budgets by straight lines in the logarithm of the tokens: of the logarithm of a loss,
    of a score like accuracy itself. The interval resamples the seeds of every budget of both kinds.
    """
    random = np.random.default_rng(0)

    def ratio(pick: bool) -> float:
        def mean(scores: Sequence[float]) -> float:
            values = np.asarray(scores, dtype=np.float64)
            score = random.choice(values, len(values)).mean() if pick else values.mean()
            return float(-score if higher_is_better else np.log(score))

        points = [(budget, mean(scores)) for budget, scores in first.items()]
        return _ratio(points, mean(second[tokens]), tokens)

    drawn = [ratio(pick=True) for _ in range(_RESAMPLES)]
    return Potential(
        Estimate(ratio(pick=False), *ends_by_rank(drawn)),
        at_least=max(first) / tokens,
        at_most=min(first) / tokens,
    )


def _ratio(points: Sequence[tuple[float, float]], score: float, tokens: float) -> float:
    """The least data at which the joined points come down to the score, over `tokens`."""
    points = sorted(points)
    if score > points[0][1]:
        return 0.0
    for (fewer, worse), (more, better) in pairwise(points):
        if better <= score < worse:
            share = (worse - score) / (worse - better)
            return float(np.exp(np.log(fewer) + share * np.log(more / fewer)) / tokens)
    return points[0][0] / tokens if score == points[0][1] else float("inf")


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high
