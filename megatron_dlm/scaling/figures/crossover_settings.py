"""The places of a study at which two labels of an axis are compared, and how they compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.crossings import Comparison, Curve, compare
from megatron_dlm.scaling.figures.checks import seed_axis
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.extents import apart, share_x, unequal_ends
from megatron_dlm.scaling.results import Results, curve_of

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

Runs = Mapping[str, Curve]
"""Run -> its curve: the seeds of one label at one place."""


@dataclass(frozen=True)
class Setting:
    """One place in the study, with the curves of both labels there and what they say."""

    labels: tuple[str, ...]
    """Of the axes that are neither compared nor repetitions."""
    title: str
    first: Runs
    second: Runs
    found: Comparison

    @property
    def has_interval(self) -> bool:
        """Whether there is more than one seed to resample."""
        return max(len(self.first), len(self.second)) > 1

    @property
    def outcome(self) -> str:
        """crosses, not yet, or from the start."""
        crossing = self.found.crossing.value
        if crossing == float("inf"):
            return "not yet"
        return "from the start" if crossing == float("-inf") else "crosses"

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the crossing, with inf or -inf beyond the range; None where it says nothing more."""
        low, high = self.found.crossing.low, self.found.crossing.high
        is_certain = low == high and self.outcome != "crosses"
        return None if is_certain or not self.has_interval else (low, high)

    @property
    def difference(self) -> Estimate:
        """Best of the second less best of the first."""
        return self.found.difference

    @property
    def ends(self) -> str:
        """Which run ends before the others; empty where all go equally far."""
        return unequal_ends({**self.first, **self.second})


def other_axes(spec: CrossoverSpec, study: Study) -> tuple[str, ...]:
    """The axes that are neither compared nor repetitions."""
    seeds = seed_axis(study, spec.seeds)
    return tuple(axis for axis in study.axes if axis not in (spec.axis, seeds))


def settings_of(
    spec: CrossoverSpec, results: Results, study: Study
) -> tuple[list[Setting], tuple[str, ...]]:
    """The settings that can be compared in the order of the study, and sentences about the others.

    Raises ValueError where there is none.
    """
    places, without_curve = _places(spec, results, study)
    settings, notes = [], []
    alone: dict[str, list[str]] = {}
    for place, labels in places.items():
        title = ", ".join(place) or study.name
        missing = [label for label in (spec.first, spec.second) if label not in labels]
        both = {run: curve for of_label in labels.values() for run, curve in of_label.items()}
        if missing:
            alone.setdefault(missing[0], []).append(title)
        elif not share_x(both):
            notes.append(f"{title}: left out, {apart(both)}.")
        else:
            settings.append(_compared(spec, place, title, labels))
    for label, titles in alone.items():
        notes.append(f"Left out, without a curve of {label}: {'; '.join(titles)}.")
    if without_curve:
        runs = ", ".join(without_curve)
        notes.append(f"Left out, with fewer than two values of {spec.metric}: {runs}.")
    if not settings:
        raise ValueError(
            f"{results.source}: no setting of {study.name} has two validations with {spec.metric} "
            f"of both {spec.first} and {spec.second}; run the study further. {' '.join(notes)}"
        )
    return settings, tuple(notes)


def _compared(
    spec: CrossoverSpec, place: tuple[str, ...], title: str, labels: Mapping[str, Runs]
) -> Setting:
    first, second = labels[spec.first], labels[spec.second]
    found = compare(
        tuple(first.values()),
        tuple(second.values()),
        higher_is_better=spec.higher_is_better,
        smoothing=spec.smoothing,
        count=spec.resamples,
    )
    return Setting(place, title, first, second, found)


def _places(
    spec: CrossoverSpec, results: Results, study: Study
) -> tuple[dict[tuple[str, ...], dict[str, dict[str, Curve]]], list[str]]:
    """Place -> label -> run -> curve, of both labels, and the runs that have no curve."""
    axes, reports = other_axes(spec, study), results.runs()
    places: dict[tuple[str, ...], dict[str, dict[str, Curve]]] = {}
    without_curve = []
    for run in study.runs:
        label, rows = run.labels[spec.axis], reports.get(run.name, ())
        is_chosen = all(run.labels[axis] in chosen for axis, chosen in spec.only.items())
        if not rows or not is_chosen or label not in (spec.first, spec.second):
            continue
        curve = curve_of(rows, spec.x, spec.metric)
        if curve is None:
            without_curve.append(run.name)
            continue
        of_place = places.setdefault(tuple(run.labels[axis] for axis in axes), {})
        of_place.setdefault(label, {})[run.name] = curve
    return places, without_curve
