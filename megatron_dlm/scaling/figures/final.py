"""Kind `final`: one score per run against a number, or side by side for the labels of an axis.

Against a number every line's lowest point is marked and told with its neighbours. Against unique
tokens more is always better, so two lines are compared by their data potential instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.figures.checks import check_axis, check_label
from megatron_dlm.scaling.figures.directions import Direction, direction_of
from megatron_dlm.scaling.figures.drawn import Drawn, write_numbers
from megatron_dlm.scaling.figures.families import (
    Grouping,
    Member,
    bound_note,
    interval_note,
    members_of,
    refuse_twins,
)
from megatron_dlm.scaling.figures.final_picture import draw_scores, score_name
from megatron_dlm.scaling.figures.final_tables import Table, table_of
from megatron_dlm.scaling.figures.ratios import over_twins, ratio_rows
from megatron_dlm.scaling.figures.scales import Scale
from megatron_dlm.scaling.figures.scores import Line, Score, Scores, X, lines_of, score_of
from megatron_dlm.scaling.figures.style import axis_name, save
from megatron_dlm.scaling.results import Results, number

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study


@dataclass(frozen=True)
class FinalSpec(Grouping):
    """Keys of kind `final`."""

    x: str = ""
    """Column with a number (unique_tokens, num_parameters, optimizer.lr), or axis of the study."""
    metric: str = "nelbo"
    """Column of the validations."""
    higher_is_better: bool = False
    """Whether the metric is one like accuracy; of losses the lower one is better."""
    score: Score = "best"
    """best: the best of a run, as early stopping would keep it; last: at its end."""
    reference: Mapping[str, str] = field(default_factory=dict)
    """Axis -> label of runs that have no x of their own: drawn as a horizontal line."""
    over: Mapping[str, str] = field(default_factory=dict)
    """Axis -> label: every score is divided by that of the run with this label and otherwise the
    same, which is not drawn itself."""
    x_scale: Scale = "auto"
    """auto: in logarithms where x spans more than a factor of 10."""
    highest: float | None = None
    """Scores above this are not shown in the picture; null: all are."""

    def __post_init__(self) -> None:
        require(self.x != "", "x is missing; give a column with a number, or an axis")
        require(not (self.over and self.reference), "over and reference exclude each other")
        require(self.x not in self.over, f"x is {self.x}, which over holds fixed")

    @property
    def direction(self) -> Direction:
        """Which values of the metric are better."""
        return direction_of(higher_is_better=self.higher_is_better)

    def check(self, study: Study) -> None:
        """Raise ValueError, which names the key, for what the study does not have."""
        super().check(study)
        for key, labels in (("reference", self.reference), ("over", self.over)):
            for axis, label in labels.items():
                check_axis(study, key, axis)
                check_label(study, key, axis, label)


def draw(spec: FinalSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Write stem.png, .svg and .csv.

    Raises ValueError for an x that is no column of numbers and no axis, and for two runs at one
    place.
    """
    is_axis = spec.x in study.axes
    if not is_axis:
        _check_numbers(results, spec.x)
    results.check_columns(spec.metric)
    chosen, left_out = _with_score(members_of(results, study, spec), spec, is_axis=is_axis)
    ratios, without_twin = _ratios(chosen, study, spec)
    members = [
        member
        for member in chosen
        if not _is_reference(member, spec) and (ratios is None or member.run in ratios)
    ]
    references = [member for member in chosen if _is_reference(member, spec)]
    if not members:
        raise ValueError(
            f"{results.source}: no run has a finite {spec.metric} and {spec.x}; "
            "run the study further"
        )
    scores = _scores(spec, study, members, references, ratios)
    if ratios is None:
        table = table_of(scores, spec.x, spec.direction, is_axis=is_axis)
    else:
        table = Table(("panel", "line", axis_name(spec.x), "pairs", "ratio"), ratio_rows(scores))
    order = study.labels_of(spec.x) if is_axis else ()
    present = {str(point.x) for line in scores.lines for point in line.points}
    order = tuple(label for label in order if label in present)
    figure = draw_scores(scores, spec, table.best, order)
    files = (*save(figure, stem), _numbers(scores, spec, table, stem))
    notes = (
        *bound_note(chosen, spec.metric, study),
        _score_note(chosen, spec),
        interval_note([len(point.scores) for point in scores.points]),
        *table.notes,
        *left_out,
        *without_twin,
        *_hidden_note(scores, spec),
    )
    title = f"{study.name}: {score_name(spec)} against {axis_name(spec.x)}"
    return Drawn(files, title, table.header, table.rows, notes)


def _check_numbers(results: Results, column: str) -> None:
    """Refuse a column without numbers; the message lists those that have some."""
    if any(number(row, column) is not None for row in results.rows):
        return
    have = [
        name
        for name in results.columns
        if "_at_noise_" not in name
        and any(number(row, name) is not None for row in results.rows[-1:] + results.rows[:1])
    ]
    raise ValueError(
        f"x is {column}, but no row of {results.source} has a number there; with numbers: "
        f"{', '.join(have)}"
    )


def _with_score(
    members: Sequence[Member], spec: FinalSpec, *, is_axis: bool
) -> tuple[list[Member], tuple[str, ...]]:
    """The runs that have a score and a place, and sentences about the others."""
    unscored = [member for member in members if _score_of(member, spec) is None]
    placeless = [
        member
        for member in members
        if not is_axis and not _is_reference(member, spec) and _number(member, spec.x) is None
    ]
    notes = []
    if unscored:
        names = ", ".join(member.run for member in unscored)
        notes.append(f"Left out, without a finite {spec.score} {spec.metric}: {names}.")
    if placeless:
        names = ", ".join(member.run for member in placeless)
        notes.append(f"Left out, without a number {spec.x}: {names}.")
    out = {member.run for member in (*unscored, *placeless)}
    return [member for member in members if member.run not in out], tuple(notes)


def _number(member: Member, column: str) -> float | None:
    """Settings are the same in every report; of a column that grows, the last counts."""
    return number(member.rows[-1], column)


def _is_reference(member: Member, spec: FinalSpec) -> bool:
    return bool(spec.reference) and all(
        member.rows[-1].get(axis) == label for axis, label in spec.reference.items()
    )


def _ratios(
    members: Sequence[Member], study: Study, spec: FinalSpec
) -> tuple[dict[str, float] | None, tuple[str, ...]]:
    """Run -> its score over its twin's where the keys ask for that, and what to say of others."""
    if not spec.over:
        return None, ()
    return over_twins(members, study, spec.over, lambda member: _score(member, spec))


def _score_of(member: Member, spec: FinalSpec) -> float | None:
    return score_of(member, spec.metric, spec.score, spec.direction)


def _score(member: Member, spec: FinalSpec) -> float:
    value = _score_of(member, spec)
    assert value is not None, "runs without one are left out before"
    return value


def _scores(
    spec: FinalSpec,
    study: Study,
    members: Sequence[Member],
    references: Sequence[Member],
    ratios: Mapping[str, float] | None,
) -> Scores:
    def place(member: Member) -> X:
        if spec.x in study.axes:
            return str(member.rows[-1][spec.x])
        value = _number(member, spec.x)
        assert value is not None, "runs without one are left out before"
        return value

    def score(member: Member) -> float:
        return _score(member, spec) if ratios is None else ratios[member.run]

    refuse_twins(members, study, lambda m: (m.panel, m.line, m.seed, place(m)))
    refuse_twins(references, study, lambda m: (m.panel, m.seed))
    name = " ".join(spec.reference.values())
    lines = lines_of(members, place, score)
    if spec.x in study.axes:
        lines = tuple(_in_order(line, study.labels_of(spec.x)) for line in lines)
    bands = lines_of([_renamed(member, name) for member in references], lambda _: name, score)
    return Scores(lines, bands)


def _renamed(member: Member, line: str) -> Member:
    return Member(member.run, member.panel, line, member.seed, member.rows)


def _in_order(line: Line, labels: Sequence[str]) -> Line:
    points = sorted(line.points, key=lambda point: labels.index(str(point.x)))
    return Line(line.panel, line.label, tuple(points))


def _numbers(scores: Scores, spec: FinalSpec, table: Table, stem: Path) -> Path:
    header = ("panel", "line", spec.x, "num_seeds", spec.metric, "low", "high", "is_best")
    rows = []
    for line in (*scores.lines, *scores.references):
        for point in line.points:
            mean = point.mean
            is_best = int(table.best.get((line.panel, line.label)) == point.x)
            x = point.x if line in scores.lines else None
            numbers = (len(point.scores), mean.value, mean.low, mean.high, is_best)
            rows.append((line.panel, line.label, x, *numbers))
    return write_numbers(stem.with_name(f"{stem.name}.csv"), header, rows)


def _score_note(members: Sequence[Member], spec: FinalSpec) -> str:
    ends = {member.rows[-1]["step"] for member in members}
    best = f"the {spec.direction.superlative} validation of each run"
    kind = best if spec.score == "best" else "the last of each run"
    if len(ends) == 1:
        return f"Scores are {kind}; all runs end at step {ends.pop():,}."
    return f"Scores are {kind}; the runs end at steps {min(ends):,} to {max(ends):,}."


def _hidden_note(scores: Scores, spec: FinalSpec) -> tuple[str, ...]:
    if spec.highest is None:
        return ()
    hidden = sum(point.mean.value > spec.highest for point in scores.points)
    return (f"{hidden} points above {spec.highest:g} are not in the picture.",) if hidden else ()
