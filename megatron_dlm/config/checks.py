"""The few checks every section uses; a failure names the key, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_positive(section: str, values: Mapping[str, float]) -> None:
    """Raise ValueError for the first value that is not above 0."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}; it must be greater than 0")


def require_fraction(section: str, values: Mapping[str, float], *, below_one: bool = False) -> None:
    """Raise ValueError for the first value outside [0, 1], or [0, 1) if `below_one`."""
    for name, value in values.items():
        inside = 0 <= value < 1 if below_one else 0 <= value <= 1
        interval = "[0, 1)" if below_one else "[0, 1]"
        require(inside, f"{section}.{name} is {value}; it must lie in {interval}")
