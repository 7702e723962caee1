"""Final scores in numbers: the best value of a setting, labels side by side, data potential."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_dlm.scaling.basins import Basin, find_basin
from megatron_dlm.scaling.figures.directions import Direction
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.families import in_words
from megatron_dlm.scaling.figures.potential import potential_at
from megatron_dlm.scaling.figures.scales import short_tick
from megatron_dlm.scaling.figures.scores import Line, Point, Scores, X
from megatron_dlm.scaling.figures.style import axis_name

_UNIQUE = ("unique_tokens", "data.unique_tokens")


@dataclass(frozen=True)
class Table:
    """The small table of a figure."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    best: Mapping[tuple[str, str], X] = field(default_factory=dict)
    """Panel and line -> x of the best point; empty where x has no best value."""


def table_of(scores: Scores, x: str, direction: Direction, *, is_axis: bool) -> Table:
    """The table that fits x: an axis, unique tokens, or any other number."""
    if is_axis:
        return _label_table(scores, x, direction)
    if x in _UNIQUE:
        return _potential_table(scores, direction)
    return _basin_table(scores, x, direction)


def _label_table(scores: Scores, axis: str, direction: Direction) -> Table:
    rows, places = [], {}
    for line in scores.lines:
        best = direction.best(line.points, _mean)
        places[line.panel, line.label] = best.x
        for point in line.points:
            apart = point.mean.value - best.mean.value
            words = (in_words(point.mean), f"{apart:+.3f}" if apart else direction.superlative)
            rows.append((line.panel, line.label, str(point.x), str(len(point.scores)), *words))
    rows += [
        (line.panel, line.label, "", str(len(point.scores)), in_words(point.mean), "")
        for line in scores.references
        for point in line.points
    ]
    header = ("panel", "line", axis, "seeds", "score", f"from the {direction.superlative}")
    return Table(header, tuple(rows), best=places)


def _mean(point: Point) -> float:
    return point.mean.value


def _basin_table(scores: Scores, x: str, direction: Direction) -> Table:
    header = (
        *("panel", "line", f"{direction.superlative} at", "score", direction.turn),
        *("next below", "next above", "as good"),
    )
    sign = -1 if direction.higher_is_better else 1
    rows, places, notes = [], {}, []
    for panel in dict.fromkeys(line.panel for line in scores.lines):
        lines = [line for line in scores.lines if line.panel == panel]
        basins = {}
        for line in lines:
            if len(line.points) > 1:
                losses = [[sign * score for score in point.scores] for point in line.points]
                basin = find_basin(line.numbers, losses)
                basins[line.label] = basin
                places[panel, line.label] = line.points[basin.lowest].x
                rows.append(_basin_row(line, basin))
        of_panel = [line for line in scores.references if line.panel in (panel, "")]
        notes += _shift_notes(panel, basins, axis_name(x), direction)
        notes += [_reference_note(panel, lines, reference, direction) for reference in of_panel]
    rows += [
        (line.panel, line.label, "", in_words(point.mean), *("",) * (len(header) - 4))
        for line in scores.references
        for point in line.points
    ]
    if places:
        notes.append(
            f"{direction.turn.capitalize()}: of the parabola through the {direction.superlative} "
            "point and its neighbours."
        )
    if any(len(point.scores) > 1 for line in scores.lines for point in line.points):
        notes.append(
            "Its interval, and which values are as good (not told apart from the "
            f"{direction.superlative}), come from resampled seeds."
        )
    return Table(header, tuple(rows), tuple(notes), places)


def _basin_row(line: Line, basin: Basin) -> tuple[str, ...]:
    best = line.points[basin.lowest]
    neighbours = []
    for place in (basin.lowest - 1, basin.lowest + 1):
        if 0 <= place < len(line.points):
            neighbours.append(f"{line.points[place].mean.value - best.mean.value:+.3f}")
        else:
            neighbours.append("not trained")
    bottom = basin.bottom
    words = short_tick(bottom.value)
    if bottom.low != bottom.high:
        words += f" [{short_tick(bottom.low)}, {short_tick(bottom.high)}]"
    return (
        *(line.panel, line.label, short_tick(float(best.x)), in_words(best.mean), words),
        *neighbours,
        " ".join(short_tick(line.numbers[place]) for place in basin.as_good),
    )


def _shift_notes(
    panel: str, basins: Mapping[str, Basin], name: str, direction: Direction
) -> list[str]:
    """At the edge, and how far the best value moves from the first line to the last."""
    notes = []
    edges = [label for label, basin in basins.items() if basin.is_at_edge]
    if edges:
        of_lines = f" of {', '.join(edges)}" if any(edges) else ""
        text = f"the {direction.superlative} point{of_lines} is at the edge of what was trained: "
        notes.append(_said(panel, f"{text}the best {name} may lie beyond it."))
    inside = {label: basin.bottom for label, basin in basins.items() if not basin.is_at_edge}
    if len(inside) > 1:
        values = [bottom.value for bottom in inside.values()]
        listed = ", ".join(f"{label} {short_tick(at.value)}" for label, at in inside.items())
        if min(values) > 0:
            span = f"a factor of {max(values) / min(values):.3g}"
        else:
            span = in_short(max(values) - min(values))
        text = f"best {name}: {listed}; {span} between the smallest and the largest."
        notes.append(_said(panel, text))
    return notes


def _reference_note(
    panel: str, lines: Sequence[Line], reference: Line, direction: Direction
) -> str:
    points = [(line.label, point) for line in lines for point in line.points]
    label, best = direction.best(points, lambda pair: _mean(pair[1]))
    difference = best.mean.value - reference.points[0].mean.value
    place = f"{label} at" if label else "at"
    side = "above" if difference > 0 else "below"
    text = f"the {direction.superlative} score of the others ({place} {short_tick(float(best.x))})"
    return _said(panel, f"{text} is {abs(difference):.3f} {side} that of {reference.label}.")


def _said(panel: str, text: str) -> str:
    """A sentence about a panel."""
    return f"{panel}: {text}" if panel else text[0].upper() + text[1:]


def _potential_table(scores: Scores, direction: Direction) -> Table:
    labels = list(dict.fromkeys(line.label for line in scores.lines))
    if len(labels) != 2:
        rows = tuple(
            (line.panel, line.label, short_tick(float(point.x)), in_words(point.mean))
            for line in (*scores.lines, *scores.references)
            for point in line.points
        )
        return Table(("panel", "line", "unique tokens", "score"), rows)
    rows_of_pairs = []
    for panel in dict.fromkeys(line.panel for line in scores.lines):
        pair = {line.label: line for line in scores.lines if line.panel == panel}
        if len(pair) == 2:
            rows_of_pairs += _potential_rows(panel, pair[labels[0]], pair[labels[1]], direction)
    header = ("panel", "unique tokens", *labels, "data potential")
    of_score = "score" if direction.higher_is_better else "logarithm of the score"
    note = (
        f"Data potential: the unique tokens that {labels[0]} needs for the score of {labels[1]}, "
        f"over those {labels[1]} has, between budgets by straight lines of the {of_score} in the "
        "logarithm of the tokens. More than (>) or less than (<): no budget that was trained "
        "reaches it, so only this bound is known."
    )
    return Table(header, tuple(rows_of_pairs), (note,))


def _potential_rows(
    panel: str, first: Line, second: Line, direction: Direction
) -> list[tuple[str, ...]]:
    ours = {float(point.x): point for point in first.points}
    rows: list[tuple[str, ...]] = []
    for point in second.points:
        tokens = float(point.x)
        potential = potential_at(
            *(first.by_number, second.by_number, tokens),
            higher_is_better=direction.higher_is_better,
        )
        beside = in_words(ours[tokens].mean) if tokens in ours else ""
        rows.append((panel, short_tick(tokens), beside, in_words(point.mean), str(potential)))
    return rows
