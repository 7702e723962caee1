"""Scales and legends of figures: logarithms where numbers span much, ticks that people can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["auto", "linear", "log"]
_LOG_FROM = 10.0
"""Numbers that span more than this factor are drawn in logarithms."""
_MAX_NAMED = 9
_MANY = 1000
_DECADES = 300.0
"""Up to this span of a logarithmic axis there is room for ticks between the powers of ten."""
_START_SHARE = 0.1
_LEGEND_INCHES_PER_LETTER = 0.075
_LEGEND_INCHES_PER_LINE = 0.75


def is_logarithmic(values: Sequence[float], scale: Scale) -> bool:
    """Whether an axis with these values is drawn in logarithms; ValueError where it cannot be."""
    if scale == "log" and min(values) <= 0:
        raise ValueError(f"scale is log, but a value is {min(values):g}; ask for linear")
    if scale == "auto":
        return min(values) > 0 and max(values) / min(values) > _LOG_FROM
    return scale == "log"


def name_values(axes: Axes, values: Sequence[float], *, logarithmic: bool) -> None:
    """Scale of x, with a tick at every value where they are few, and room around the outer ones."""
    from matplotlib.ticker import NullLocator

    places = sorted(set(values))
    if logarithmic:
        axes.set_xscale("log")
        axes.margins(x=0.08)
    if len(places) <= _MAX_NAMED:
        axes.set_xticks(places, [short_tick(place) for place in places])
        if sum(len(short_tick(place)) for place in places) > 30:
            axes.tick_params(axis="x", labelrotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
    elif logarithmic or max(places) >= _MANY:
        count_ticks(axes)


def count_ticks(axes: Axes) -> None:
    """Ticks of x as 8k, 2M or 4e15; in logarithms at 1, 2 and 5 where no more fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    in_short = FuncFormatter(lambda value, _: short_tick(value))
    axes.xaxis.set_major_formatter(in_short)
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        if high / low < _DECADES:
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())


def short_tick(value: float, digits: int = 3) -> str:
    """8.19k, 131k, 2M, 10G, 3e-4, 0.1, 4e15; with `digits` of them at most."""
    rounded = float(f"{value:.{digits}g}")  # 999,999 is 1M, not 1000k
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(rounded) < 1000 * unit:
            return f"{rounded / unit:.{digits}g}{name}"
    if 0 < abs(rounded) < 0.01 or abs(rounded) >= 1e12:
        mantissa, power = f"{rounded:.{digits - 1}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(power)}"
    return f"{rounded:.{digits}g}"


def range_without_start(
    curves: Sequence[Sequence[float]], *, is_rising: bool = False
) -> tuple[float, float]:
    """Limits of y that show everything but the steep start, from which every run comes down.

    is_rising: of curves that come up all is shown.
    """
    lowest = min(min(values) for values in curves)
    starts = [0 if is_rising else int(len(values) * _START_SHARE) for values in curves]
    highest = max(max(values[start:]) for values, start in zip(curves, starts, strict=True))
    margin = 0.06 * (highest - lowest) or 0.1
    return lowest - margin, highest + margin


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, as wide as they are; none where lines have no names."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if not handles:
        return
    longest = max(len(name) for name in handles)
    each = _LEGEND_INCHES_PER_LINE + _LEGEND_INCHES_PER_LETTER * longest
    columns = max(1, min(len(handles), int(0.95 * figure.get_figwidth() / each)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
    )
