"""Which values of a metric are the better ones, and the words for it."""

from __future__ import annotations

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

    def best_place(self, values: Floats) -> int:
        """Where the best of the values is; of equal ones the first."""
        return int(values.argmax() if self.higher_is_better else values.argmin())


_LOWER = Direction(False, past="below", comparative="lower", superlative="lowest")
_HIGHER = Direction(True, past="above", comparative="higher", superlative="highest")


def direction_of(*, higher_is_better: bool) -> Direction:
    """Losses are better when lower, accuracies when higher."""
    return _HIGHER if higher_is_better else _LOWER
