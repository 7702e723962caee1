"""Which values of a metric are the better ones, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dlm.scaling.bootstrap import Floats


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

    def best(self, values: Iterable[float]) -> float:
        """The best of the values."""
        return max(values) if self.higher_is_better else min(values)

    def best_place(self, values: Floats) -> int:
        """Where the best of the values is; of equal ones the first."""
        return int(values.argmax() if self.higher_is_better else values.argmin())


_LOWER = Direction(False, "below", "lower", "lowest", "bottom")
_HIGHER = Direction(True, "above", "higher", "highest", "top")


def direction_of(*, higher_is_better: bool) -> Direction:
    """Losses are better when lower, accuracies when higher."""
    return _HIGHER if higher_is_better else _LOWER
