"""What `scaling recommend` says: numbers, the law behind each, and where it was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Question:
    """What is there."""

    unique_tokens: float
    flops: float
    convention: str
    """How flops counts: six_n, six_p_and_attention or fine."""
    seq_length: int


@dataclass(frozen=True)
class Advice:
    """One number."""

    value: float
    low: float | None
    """95 % interval; None where the law says nothing about it."""
    high: float | None
    law: str
    """Which law says so."""
    measured: str
    """On what it was measured."""
    decades: float
    """By how many powers of ten the question lies outside of that; 0 inside."""


@dataclass(frozen=True)
class Recommendation:
    """How to train one kind of model."""

    objective: str
    numbers: Mapping[str, Advice]
    """parameters, flops_per_token, tokens, epochs, batch_tokens, steps, learning_rate, loss: those
    that a law says something about."""
    notes: tuple[str, ...]
    is_published: bool
    """By laws of papers, not by files of `scaling fit`."""
    measured_epochs: float | None = None
    """The most epochs that the law of the sizes was measured on; None where it is published."""

    def with_numbers(self, numbers: Mapping[str, Advice], *notes: str) -> Recommendation:
        """The same with more numbers."""
        return replace(self, numbers={**self.numbers, **numbers}, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Choice:
    """Which objective, and why."""

    objective: str | None
    """None where nothing at hand decides."""
    reasons: tuple[str, ...]


def is_autoregressive(objective: str) -> bool:
    """Whether the first word of a label is ar or autoregressive: its loss is exact, not a bound."""
    return re.split(r"[^a-z]", objective.lower(), maxsplit=1)[0] in ("ar", "autoregressive")


def decades_outside(value: float, low: float, high: float) -> float:
    """Powers of ten between a value and the nearer end of a range; 0 inside."""
    if value < low:
        return math.log10(low / value)
    return math.log10(value / high) if value > high else 0.0
