"""One score of every run, in lines over a number or over labels: what kind `final` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.figures.directions import Direction
from megatron_dlm.scaling.figures.families import Member, estimate_of, grouped
from megatron_dlm.scaling.results import number

Score = Literal["best", "last"]
X = float | str


@dataclass(frozen=True)
class Point:
    """The runs of one setting."""

    x: X
    """A number, or a label where x is an axis."""
    scores: tuple[float, ...]
    """One of every seed."""

    @property
    def mean(self) -> Estimate:
        """Over the seeds, with its interval."""
        return estimate_of(self.scores)


@dataclass(frozen=True)
class Line:
    """Points of one label, by x."""

    panel: str
    label: str
    points: tuple[Point, ...]

    @property
    def numbers(self) -> list[float]:
        """x of every point, where x is a number."""
        return [float(point.x) for point in self.points]

    @property
    def by_number(self) -> Mapping[float, Sequence[float]]:
        """x -> the scores there, where x is a number."""
        return {float(point.x): point.scores for point in self.points}


@dataclass(frozen=True)
class Scores:
    """All that a figure of final scores shows."""

    lines: tuple[Line, ...]
    references: tuple[Line, ...]
    """Runs without an x of their own: one point each, drawn as a horizontal line."""

    @property
    def points(self) -> list[Point]:
        return [point for line in (*self.lines, *self.references) for point in line.points]


def score_of(member: Member, metric: str, score: Score, direction: Direction) -> float | None:
    """The best value of the metric, or the last that was reported; None where that is not finite.

    Not every validation has every metric: some come from `evaluate`, for checkpoints only.
    """
    values = [number(row, metric) for row in member.rows if row.get(metric) is not None]
    if score == "last":
        return values[-1] if values else None
    finite = [value for value in values if value is not None]
    return direction.best(finite, float) if finite else None


def lines_of(
    members: Sequence[Member], place: Callable[[Member], X], score: Callable[[Member], float]
) -> tuple[Line, ...]:
    """Lines by panel; numbers rise along a line, labels stay in the order of the members."""
    lines = []
    for panel, of_panel in grouped(members, lambda member: member.panel).items():
        for label, of_line in grouped(of_panel, lambda member: member.line).items():
            found: dict[X, list[float]] = {}
            for member in of_line:
                found.setdefault(place(member), []).append(score(member))
            points = [Point(x, tuple(scores)) for x, scores in found.items()]
            if all(isinstance(point.x, float) for point in points):
                points.sort(key=lambda point: float(point.x))
            lines.append(Line(panel, label, tuple(points)))
    return tuple(lines)
