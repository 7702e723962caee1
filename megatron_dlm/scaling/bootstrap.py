"""Intervals by resampling: what a fit would have said had other runs of the same kind been made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def resamples(
    num_items: int, count: int, seed: int, groups: Sequence[object] | None = None
) -> Iterator[Indices]:
    """`count` draws of num_items indices with replacement.

    With groups (one label per item) every group keeps its size: runs of one compute budget, or
    seeds of one setting, are exchanged for each other only.
    """
    random = np.random.default_rng(seed)
    labels = [0] * num_items if groups is None else list(groups)
    assert len(labels) == num_items, (len(labels), num_items)
    members = [
        np.array([place for place, label in enumerate(labels) if label == group], dtype=np.int64)
        for group in dict.fromkeys(labels)
    ]
    for _ in range(count):
        yield np.concatenate([random.choice(group, len(group)) for group in members])


def estimates(
    fit: Callable[[Indices], Sequence[float]],
    num_items: int,
    *,
    count: int = 1000,
    seed: int = 0,
    groups: Sequence[object] | None = None,
    level: float = 0.95,
) -> list[Estimate]:
    """The numbers that `fit` makes of all items, with percentile intervals over resamples.

    A resample that cannot be fitted (ValueError) is left out; ValueError if more than half are.
    """
    values = fit(np.arange(num_items))
    drawn: list[Sequence[float]] = []
    for indices in resamples(num_items, count, seed, groups):
        try:
            drawn.append(fit(indices))
        except ValueError:
            continue
    if len(drawn) < count / 2:
        raise ValueError(
            f"only {len(drawn)} of {count} resamples could be fitted; the runs are too few or too "
            "alike for an interval"
        )
    return intervals(values, np.asarray(drawn, dtype=np.float64), level=level)


def intervals(values: Sequence[float], drawn: Floats, *, level: float = 0.95) -> list[Estimate]:
    """Percentile intervals of the columns of drawn [resamples, k] around values [k]."""
    tail = (1 - level) / 2
    lows, highs = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [
        Estimate(float(value), float(low), float(high))
        for value, low, high in zip(values, lows, highs, strict=True)
    ]
