"""A histogram that is added up over ranks: the same ranges for all values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Four edges per power of ten from 1e-8 to 1e3, for both signs; the ranges at the ends are open.
_MAGNITUDES = [10.0 ** (quarter / 4) for quarter in range(-32, 13)]
EDGES = tuple([-value for value in reversed(_MAGNITUDES)] + _MAGNITUDES)


@dataclass(frozen=True)
class Histogram:
    """All values of one parameter, or of its gradient, over all ranks."""

    total: float
    """Sum of the values."""
    sum_of_squares: float
    counts: Sequence[float]
    """Values in (EDGES[i-1], EDGES[i]], with one open range at either end."""
