"""Numbers as people say them."""

from __future__ import annotations

_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def with_unit(number: float, *, digits: int = 4, gap: str = "") -> str:
    """12.35M for 12,345,678; no unit for numbers below 1,000, and for those from 1e15 on."""
    rounded = float(f"{number:.{digits}g}")  # 999,999 is 1M, not 1000k
    for unit, size in _UNITS:
        if size <= abs(rounded) < 1000 * size:
            return f"{rounded / size:.{digits}g}{gap}{unit}"
    return f"{rounded:.{digits}g}"
