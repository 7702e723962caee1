"""Which runs of a table belong together in a figure: its panels, its lines, and their seeds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.config.keys import suggestion
from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.figures.checks import check_axis, check_label, seed_axis
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.results import Results, Row, number

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

_RESAMPLES = 1000
_KIND = "objective.kind"


@dataclass(frozen=True)
class Grouping:
    """The keys that all kinds share which draw lines of runs."""

    lines: str | None = None
    """Axis, or setting that an axis changes, of which every value gets a line."""
    panels: str | None = None
    """Axis, or setting that an axis changes, of which every value gets a panel."""
    seeds: str | None = None
    """Axis of repetitions, over which means are taken; default: `seed` where the study has it."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Axis -> the labels that are drawn; all where it is not named."""

    def check(self, study: Study) -> None:
        """Raise ValueError, which names the key, for what the study does not have."""
        check_axis(study, "seeds", self.seeds)
        for key, name in (("lines", self.lines), ("panels", self.panels)):
            if name is not None and name not in (*study.axes, *study.settings):
                have = ", ".join((*study.axes, *study.settings))
                meant = suggestion(name, (*study.axes, *study.settings))
                raise ValueError(
                    f"{key} {name} is no axis of {study.name} and no setting of one{meant} "
                    f"(have: {have})"
                )
        for axis, labels in self.only.items():
            check_axis(study, "only", axis)
            for label in labels:
                check_label(study, "only", axis, label)


@dataclass(frozen=True)
class Member:
    """One run in its place; a label is empty where the figure does not tell runs apart by it."""

    run: str
    panel: str
    line: str
    seed: str
    rows: tuple[Row, ...]
    """Its validations by step."""


def members_of(results: Results, study: Study, grouping: Grouping) -> list[Member]:
    """The runs to draw, by panel, line and seed in the order of the study's labels.

    Raises ValueError where the table lacks a column or nothing is left to draw.
    """
    names = (grouping.panels, grouping.lines, seed_axis(study, grouping.seeds))
    results.check_columns(*(name for name in (*names, *grouping.only) if name is not None))
    chosen = {
        run: rows
        for run, rows in results.runs().items()
        if all(str(rows[-1].get(axis)) in labels for axis, labels in grouping.only.items())
    }
    columns = [_labels([rows[-1] for rows in chosen.values()], name) for name in names]
    found = [
        Member(run, panel, line, seed, rows)
        for (run, rows), panel, line, seed in zip(chosen.items(), *columns, strict=True)
    ]
    if not found:
        which = " of those that `only` names" if grouping.only else ""
        raise ValueError(f"{results.source}: no run{which} has validated; run the study further")
    orders = [
        _order(study, name, of_column) for name, of_column in zip(names, columns, strict=True)
    ]

    def place(member: Member) -> tuple[int, ...]:
        labels = (member.panel, member.line, member.seed)
        return tuple(order[label] for order, label in zip(orders, labels, strict=True))

    return sorted(found, key=place)


def grouped(members: Sequence[Member], key: Callable[[Member], str]) -> dict[str, list[Member]]:
    """Label -> its members, in their order."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def refuse_twins(
    members: Sequence[Member], study: Study, place: Callable[[Member], Hashable]
) -> None:
    """Raise ValueError, which names the axis to blame, where two runs have the same place."""
    seen: dict[Hashable, Member] = {}
    for member in members:
        twin = seen.setdefault(place(member), member)
        if twin is not member:
            pairs = ((twin.rows[-1].get(axis), member.rows[-1].get(axis)) for axis in study.axes)
            differ = [
                axis for axis, pair in zip(study.axes, pairs, strict=True) if len({*pair}) > 1
            ]
            raise ValueError(
                f"runs {twin.run} and {member.run} have one place in the figure; they differ in "
                f"{' and '.join(differ) or 'nothing'}: give it to lines, panels or seeds, or "
                "choose labels of it by only"
            )


def mean_over_seeds(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, low and high over the seeds of values [seeds, ...].

    From three seeds on the 95 % bootstrap interval of the mean, with two seeds their range, with
    one the value itself.
    """
    mean = values.mean(axis=0)
    if len(values) < 3:
        return mean, values.min(axis=0), values.max(axis=0)
    # Which seeds are drawn how often is the same at every place of a curve.
    random = np.random.default_rng(0)
    draws = random.integers(len(values), size=(_RESAMPLES, len(values)))
    weights = np.stack([np.bincount(draw, minlength=len(values)) for draw in draws]) / len(values)
    means = np.tensordot(weights, values, axes=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    # Of equal values every mean is the value, up to rounding that must not look like an interval.
    is_same = np.ptp(values, axis=0) == 0
    low, high = (np.where(is_same, mean, bound) for bound in (low, high))
    return mean, np.minimum(low, mean), np.maximum(high, mean)


def estimate_of(values: Sequence[float]) -> Estimate:
    """`mean_over_seeds` of one number of every seed."""
    mean, low, high = mean_over_seeds(np.asarray(values, dtype=np.float64))
    return Estimate(float(mean), float(low), float(high))


def in_words(estimate: Estimate) -> str:
    """3.121 [3.118, 3.124]; without an interval where there is none."""
    if estimate.low == estimate.high:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def interval_note(num_seeds: Sequence[int]) -> str:
    """What the intervals of this figure are, by the numbers of seeds behind its points."""
    if max(num_seeds) == 1:
        return "One seed each: there is no interval."
    parts = []
    if max(num_seeds) >= 3:
        many = sorted({number for number in num_seeds if number >= 3})
        numbers = f"{many[0]}" if len(many) == 1 else f"{many[0]} to {many[-1]}"
        parts.append(
            f"95 % bootstrap intervals of the mean over {numbers} seeds (with few seeds too narrow "
            "rather than too wide)"
        )
    if 2 in num_seeds:
        parts.append("the range where there are two seeds")
    if 1 in num_seeds:
        parts.append("none where there is one")
    return f"Intervals: {', '.join(parts)}."


def bound_note(
    members: Sequence[Member], metric: str, study: Study | None = None
) -> tuple[str, ...]:
    """What is exact and what is a bound; study: tells the objective that all its runs share."""
    if metric.rpartition("/")[2] != "nelbo":
        return ()
    # A column only where an axis changes it; else all runs of the study may share it.
    shared = {run.name: run.settings.get(_KIND) for run in (study.runs if study else ())}
    rows = [member.rows[-1] for member in members]
    kinds = {row.get(_KIND) or shared.get(row["run"]) for row in rows}
    if None in kinds:
        return ("The loss is the exact NLL of AR models and an upper bound of it for diffusion.",)
    if kinds == {"autoregressive"}:
        return ("All losses are exact.",)
    if "autoregressive" not in kinds:
        return ("All losses are upper bounds (NELBO): the NLL may be lower.",)
    return ("The loss of AR is the exact NLL, that of diffusion an upper bound (NELBO) of it.",)


def smoothing_words(width: float, x: str = "x") -> str:
    """How far a curve was averaged; width: standard deviation in ln x."""
    return (
        f"a factor of {np.exp(width):.3g} in {x} (a Gaussian with a standard deviation of "
        f"{width:g} in ln {x})"
    )


def _labels(rows: Sequence[Row], name: str | None) -> list[str]:
    """The label of each row: numbers short, with as many digits as they need to differ."""
    if name is None:
        return [""] * len(rows)
    values = [number(row, name) for row in rows]
    numbers = {value for value in values if value is not None}
    digits = 3
    while digits < 17 and len({in_short(value, digits) for value in numbers}) < len(numbers):
        digits += 1
    return [
        str(row.get(name)) if value is None else in_short(value, digits)
        for row, value in zip(rows, values, strict=True)
    ]


def _order(study: Study, name: str | None, labels: Sequence[str]) -> dict[str, int]:
    """Label -> its place: that of the study for an axis, else as they come."""
    known = study.labels_of(name) if name in study.axes else ()
    return {label: place for place, label in enumerate(dict.fromkeys((*known, *labels)))}
