"""Which values of a metric are the better ones, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from megatron_dlm.scaling.bootstrap import Floats

T = TypeVar("T")


@dataclass(frozen=True)
class Direction:
    """Of a metric."""

    higher_is_better: bool
    past: str
    """Where a curve is that has passed another."""
    comparative: str
    superlative: str
    turn: str
    """Where a curve has its best."""

    def best(self, items: Iterable[T], value: Callable[[T], float]) -> T:
        """The item with the best value; of equal ones the first."""
        return (max if self.higher_is_better else min)(items, key=value)

    def best_place(self, values: Floats) -> int:
        """Where the best of the values is; of equal ones the first."""
        return int(values.argmax() if self.higher_is_better else values.argmin())


_LOWER = Direction(False, "below", "lower", "lowest", "bottom")
_HIGHER = Direction(True, "above", "higher", "highest", "top")


def direction_of(*, higher_is_better: bool) -> Direction:
    """Losses are better when lower, accuracies when higher."""
    return _HIGHER if higher_is_better else _LOWER
