"""Scores over those of runs that differ in one label only: what a cooldown gains, a noise costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.figures.families import Member, estimate_of
from megatron_dlm.scaling.figures.scales import short_tick
from megatron_dlm.scaling.figures.scores import Scores, X

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study


def over_twins(
    members: Sequence[Member],
    study: Study,
    over: Mapping[str, str],
    score: Callable[[Member], float],
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Run -> its score over that of its twin, and a sentence about runs without one.

    The twin has the labels of `over` (axis -> label) and shares all others; twins themselves are
    left out. Raises ValueError where no run has one.
    """

    def others(member: Member) -> tuple[object, ...]:
        return tuple(member.rows[-1].get(axis) for axis in study.axes if axis not in over)

    def is_twin(member: Member) -> bool:
        return all(member.rows[-1].get(axis) == label for axis, label in over.items())

    twins = {others(member): score(member) for member in members if is_twin(member)}
    rest = [member for member in members if not is_twin(member)]
    ratios = {
        member.run: score(member) / twins[others(member)]
        for member in rest
        if others(member) in twins
    }
    name = " ".join(over.values())
    alone = [member.run for member in rest if member.run not in ratios]
    if not ratios:
        raise ValueError(f"no run has a finished twin with {name}; run the study further")
    return ratios, (f"Left out, without a twin {name}: {', '.join(alone)}.",) if alone else ()


def ratio_rows(scores: Scores) -> tuple[tuple[str, ...], ...]:
    """Panel, line, x, seeds and ratio of every point; of several also the mean over all pairs."""
    rows = [
        (line.panel, line.label, _named(point.x), str(len(point.scores)), _in_words(point.mean))
        for line in scores.lines
        for point in line.points
    ]
    every = [value for point in scores.points for value in point.scores]
    if len(rows) > 1:
        rows.append(("all", "all", "all", str(len(every)), _in_words(estimate_of(every))))
    return tuple(rows)


def _named(x: X) -> str:
    return x if isinstance(x, str) else short_tick(x)


def _in_words(ratio: Estimate) -> str:
    """With a digit more than losses have: ratios lie close to 1."""
    if ratio.low == ratio.high:
        return f"{ratio.value:.4f}"
    return f"{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
