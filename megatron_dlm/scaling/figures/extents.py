"""What is said of runs that do not cover the same x: only what all of them cover is compared."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_dlm.scaling.crossings import Curve
from megatron_dlm.scaling.figures.drawn import in_short

_ALIKE = 1.01
"""Ends within this factor are no difference to speak of."""


def share_x(curves: Mapping[str, Curve]) -> bool:
    """Whether there is a range of x that all of these runs cover."""
    start, end = (_latest_start(curves), _first_end(curves))
    return bool(curves[start].x[0] < curves[end].x[-1])


def apart(curves: Mapping[str, Curve]) -> str:
    """Which runs to blame for a missing common range."""
    start, end = _latest_start(curves), _first_end(curves)
    return (
        f"{end} ends at {in_short(float(curves[end].x[-1]))} and {start} begins at "
        f"{in_short(float(curves[start].x[0]))}: no x in common"
    )


def unequal_ends(curves: Mapping[str, Curve]) -> str:
    """Which run ends first where others go on; empty where all go equally far."""
    first = _first_end(curves)
    end, last = float(curves[first].x[-1]), max(float(curve.x[-1]) for curve in curves.values())
    if last <= _ALIKE * end:
        return ""
    return f"{first} ends at {in_short(end)}, others go on to {in_short(last)}"


def _latest_start(curves: Mapping[str, Curve]) -> str:
    return max(curves, key=lambda run: curves[run].x[0])


def _first_end(curves: Mapping[str, Curve]) -> str:
    return min(curves, key=lambda run: curves[run].x[-1])
