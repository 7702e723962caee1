"""Numbers as people say them."""

from __future__ import annotations

_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def with_unit(number: float, *, digits: int = 4, gap: str = "", below: float = float("inf")) -> str:
    """12.35M for 12,345,678; no unit for small numbers, and for those from `below` on."""
    for unit, size in _UNITS:
        if size <= abs(number) < below:
            return f"{number / size:.{digits}g}{gap}{unit}"
    return f"{number:.{digits}g}"
