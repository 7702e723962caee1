"""Kind `crossover`: where one label of an axis passes below another, for every other setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.crossings import (
    Comparison,
    Curve,
    best,
    best_difference,
    best_x,
    compare,
)
from megatron_dlm.scaling.figures.checks import check_axis, check_label, seed_axis
from megatron_dlm.scaling.figures.crossover_panels import Panel, draw_panels
from megatron_dlm.scaling.figures.drawn import Drawn, in_short, write_numbers
from megatron_dlm.scaling.figures.families import Grouping, bound_note, members_of
from megatron_dlm.scaling.figures.style import axis_name
from megatron_dlm.scaling.results import Results, curve_of

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

_SHORT = {"epoch": "epoch", "tokens": "tokens", "training_flops": "FLOPs", "step": "step"}
_NUMBERS = (
    *("num_first", "num_second", "outcome", "crossing", "crossing_low", "crossing_high"),
    *("share_of_resamples", "start_of_range", "end_of_range", "passages"),
    *("best_first", "best_first_x", "best_second", "best_second_x"),
    *("best_difference", "best_difference_low", "best_difference_high"),
)


@dataclass(frozen=True)
class CrossoverSpec:
    """Keys of kind `crossover`: a panel for every setting of the axes that are not compared."""

    axis: str
    """Axis of the study whose labels are compared."""
    first: str
    """Label that is the lower one at the beginning."""
    second: str
    """Label that is asked where it becomes the lower one for good."""
    x: Literal["epoch", "tokens", "training_flops", "step"] = "epoch"
    """Against what the curves are drawn and cross."""
    metric: str = "nelbo"
    """Validation metric, lower is better."""
    seeds: str | None = None
    """Axis of repetitions: intervals come from them; default: seed, where the study has it."""
    smoothing: float = 0.0
    """Width of a Gaussian average over the points of a curve, as a factor in x; 0: none."""
    resamples: int = 1000
    """Bootstrap resamples of the seeds."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Axis -> the labels whose settings are compared; all where it is not named."""
    x_scale: Literal["linear", "log"] = "linear"
    """Scale of the x axis."""
    highest: float | None = None
    """What lies above this is not shown in the picture; default: all is."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")
        require(self.resamples > 0, f"resamples is {self.resamples}; it must be greater than 0")
        require(
            self.first != self.second,
            f"first and second are both {self.first}; compare two labels of the axis",
        )
        require(self.axis != self.seeds, f"axis and seeds are both {self.axis}; name two axes")

    def check(self, study: Study) -> None:
        """Raise ValueError where the study lacks an axis or a label."""
        check_axis(study, "axis", self.axis)
        check_label(study, "first", self.axis, self.first)
        check_label(study, "second", self.axis, self.second)
        Grouping(seeds=self.seeds, only=self.only).check(study)


@dataclass(frozen=True)
class Setting:
    """One place in the study, with the curves of both labels there and what they say."""

    labels: tuple[str, ...]
    """Of the axes that are neither compared nor repetitions."""
    first: tuple[Curve, ...]
    second: tuple[Curve, ...]
    found: Comparison
    gain: Estimate
    """Best of the second less best of the first."""

    @property
    def has_interval(self) -> bool:
        """Whether there is more than one seed to resample."""
        return max(len(self.first), len(self.second)) > 1

    @property
    def crossing(self) -> Estimate | None:
        """Where it crosses, or None."""
        return self.found.crossing

    @property
    def outcome(self) -> str:
        """crosses, not yet, or from the start."""
        if self.crossing is not None:
            return "crosses"
        return "from the start" if self.found.is_below_at_end else "not yet"


def draw(spec: CrossoverSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Compare both labels at every setting; raises ValueError where no setting has both."""
    results.check_columns(spec.metric, spec.x)
    axes = other_axes(spec, study)
    settings = settings_of(spec, results, study)
    families = [{spec.first: one.first, spec.second: one.second} for one in settings]
    titles = [", ".join(one.labels) or study.name for one in settings]
    panels = [
        Panel(title, family, one.crossing)
        for title, family, one in zip(titles, families, settings, strict=True)
    ]
    pictures = draw_panels(
        panels,
        stem,
        x=spec.x,
        metric=spec.metric,
        is_log=spec.x_scale == "log",
        highest=spec.highest,
    )
    numbers = write_numbers(
        stem.with_name(f"{stem.name}.csv"),
        (*axes, "first", "second", "x", "metric", *_NUMBERS),
        [(*one.labels, *_compared(spec), *_numbers(one)) for one in settings],
    )
    return Drawn(
        files=(*pictures, numbers),
        title=f"{spec.second} below {spec.first}: {axis_name(spec.metric)}",
        header=(
            *(*axes, f"crosses at {_SHORT[spec.x]}", "95 % interval", "share"),
            *(f"best {spec.first}", f"best {spec.second}", "difference"),
        ),
        rows=tuple(_row(one) for one in settings),
        notes=(*_bounds(spec, results, study), *_notes(spec, settings, titles)),
    )


def other_axes(spec: CrossoverSpec, study: Study) -> tuple[str, ...]:
    """The axes that are neither compared nor repetitions."""
    seeds = seed_axis(study, spec.seeds)
    return tuple(axis for axis in study.axes if axis not in (spec.axis, seeds))


def settings_of(spec: CrossoverSpec, results: Results, study: Study) -> list[Setting]:
    """The settings at which both labels have two reports or more, in the order of the study."""
    axes, reports = other_axes(spec, study), results.runs()
    curves: dict[tuple[str, ...], dict[str, list[Curve]]] = {}
    for run in study.runs:
        if any(run.labels[axis] not in chosen for axis, chosen in spec.only.items()):
            continue
        curve = curve_of(reports.get(run.name, ()), spec.x, spec.metric)
        if curve is not None:
            of_setting = curves.setdefault(tuple(run.labels[axis] for axis in axes), {})
            of_setting.setdefault(run.labels[spec.axis], []).append(curve)
    found = [
        _compare(spec, place, labels[spec.first], labels[spec.second])
        for place, labels in curves.items()
        if spec.first in labels and spec.second in labels
    ]
    if not found:
        raise ValueError(
            f"{results.source}: no setting of {study.name} has two validations with {spec.metric} "
            f"of both {spec.first} and {spec.second}; run the study further"
        )
    return found


def _bounds(spec: CrossoverSpec, results: Results, study: Study) -> tuple[str, ...]:
    """Which of the two is exact, and which a bound."""
    labels = (spec.first, spec.second)
    chosen = Grouping(seeds=spec.seeds, only={**spec.only, spec.axis: labels})
    return bound_note(members_of(results, study, chosen), spec.metric, study)


def _compare(
    spec: CrossoverSpec, labels: tuple[str, ...], first: Sequence[Curve], second: Sequence[Curve]
) -> Setting:
    found = compare(first, second, smoothing=spec.smoothing, count=spec.resamples)
    gain = best_difference(first, second, count=spec.resamples)
    return Setting(labels, tuple(first), tuple(second), found, gain)


def _compared(spec: CrossoverSpec) -> tuple[str, ...]:
    return (spec.first, spec.second, spec.x, spec.metric)


def _numbers(one: Setting) -> tuple[float | str | None, ...]:
    crossing: tuple[float | None, ...] = (None, None, None)
    if one.crossing is not None:
        interval = (one.crossing.low, one.crossing.high) if one.has_interval else (None, None)
        crossing = (one.crossing.value, *interval)
    gain = (one.gain.low, one.gain.high) if one.has_interval else (None, None)
    return (
        *(len(one.first), len(one.second), one.outcome, *crossing),
        *(one.found.share if one.has_interval else None, one.found.start, one.found.bound),
        ";".join(f"{passage.x:.6g}" for passage in one.found.passages),
        *(best(one.first), best_x(one.first), best(one.second), best_x(one.second)),
        *(one.gain.value, *gain),
    )


def _row(one: Setting) -> tuple[str, ...]:
    crossing, interval = one.crossing, ""
    if crossing is not None:
        place = in_short(crossing.value)
        interval = f"{in_short(crossing.low)} to {in_short(crossing.high)}"
    elif one.found.is_below_at_end:
        place = f"before {in_short(one.found.start)}"
    else:
        place = f"not before {in_short(one.found.bound)}"
    difference = f"{one.gain.value:+.3f}"
    if one.has_interval:
        difference += f" ({one.gain.low:+.3f} to {one.gain.high:+.3f})"
    return (
        *(*one.labels, place, interval if one.has_interval else "one seed"),
        f"{one.found.share:.0%}" if one.has_interval else "",
        *(f"{best(one.first):.3f}", f"{best(one.second):.3f}", difference),
    )


def _notes(
    spec: CrossoverSpec, settings: Sequence[Setting], titles: Sequence[str]
) -> tuple[str, ...]:
    notes = [
        f"A crossing is where the mean of {spec.second} passes below that of {spec.first} and "
        f"stays there, by straight lines between validations. {_about_seeds(spec, settings)}",
        "A ring is the lowest point of a mean. The best of a run is its lowest validation, what "
        "early stopping keeps; a crossing alone may only say that the other curve has turned up.",
        "Curves are not smoothed."
        if spec.smoothing == 0
        else f"Before they are compared, curves are averaged over about {spec.smoothing:.0%} of x; "
        "they are drawn as they are.",
    ]
    if spec.highest is not None:
        notes.append(f"Values above {in_short(spec.highest)} are not shown in the picture.")
    remarks = [(title, _remark(spec, one)) for title, one in zip(titles, settings, strict=True)]
    return (*notes, *(f"{title}: {remark}" for title, remark in remarks if remark))


def _about_seeds(spec: CrossoverSpec, settings: Sequence[Setting]) -> str:
    """Where the intervals come from."""
    seeds = sorted({len(family) for one in settings for family in (one.first, one.second)})
    if seeds[-1] == 1:
        return "There is one seed, and no interval."
    counted = " or ".join(str(number) for number in seeds)
    return (
        f"Thin lines are seeds ({counted} in each setting), thick ones their mean. Intervals are "
        f"percentiles over {spec.resamples:,} resamples of the seeds, those of crossings over the "
        "share that crosses; with so few seeds they are too narrow rather than too wide."
    )


def _remark(spec: CrossoverSpec, one: Setting) -> str:
    """What is a bound, and where the curves cross more than once."""
    parts = []
    if one.outcome == "not yet":
        end = in_short(one.found.bound)
        parts.append(f"no crossing for good up to {end}, where the range ends")
    elif one.outcome == "from the start":
        start = in_short(one.found.start)
        parts.append(f"{spec.second} is lower from the first validation, at {start}")
    passages = one.found.passages
    if passages and (len(passages) > 1 or one.outcome == "not yet"):
        parts.append(f"the means cross at {', '.join(in_short(each.x) for each in passages)}")
    return f"{'; '.join(parts)}." if parts else ""
