"""Final scores in numbers: the best value of a setting, labels side by side, data potential."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_dlm.scaling.basins import Basin, find_basin
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.families import in_words
from megatron_dlm.scaling.figures.potential import potential_at
from megatron_dlm.scaling.figures.ratios import ratio_rows
from megatron_dlm.scaling.figures.scales import short_tick
from megatron_dlm.scaling.figures.scores import Line, Scores, X
from megatron_dlm.scaling.figures.style import axis_name

_UNIQUE = ("unique_tokens", "data.unique_tokens")
_BASIN = ("panel", "line", "lowest at", "score", "bottom", "next below", "next above", "as good")


@dataclass(frozen=True)
class Table:
    """The small table of a figure."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    lowest: Mapping[tuple[str, str], X] = field(default_factory=dict)
    """Panel and line -> x of the lowest point; empty where x has no best value."""


def table_of(scores: Scores, x: str, *, is_axis: bool, is_ratio: bool = False) -> Table:
    """The table that fits x: an axis, unique tokens, or any other number; or one of ratios."""
    if is_ratio:
        return Table(("panel", "line", axis_name(x), "pairs", "ratio"), ratio_rows(scores))
    if is_axis:
        return _label_table(scores, x)
    if x in _UNIQUE:
        return _potential_table(scores)
    return _basin_table(scores, x)


def _label_table(scores: Scores, axis: str) -> Table:
    rows, lowest = [], {}
    for line in scores.lines:
        best = min(line.points, key=lambda point: point.mean.value)
        lowest[line.panel, line.label] = best.x
        for point in line.points:
            above = point.mean.value - best.mean.value
            words = (in_words(point.mean), f"+{above:.3f}" if above else "lowest")
            rows.append((line.panel, line.label, str(point.x), str(len(point.scores)), *words))
    rows += [
        (line.panel, line.label, "", str(len(point.scores)), in_words(point.mean), "")
        for line in scores.references
        for point in line.points
    ]
    header = ("panel", "line", axis, "seeds", "score", "above the lowest")
    return Table(header, tuple(rows), lowest=lowest)


def _basin_table(scores: Scores, x: str) -> Table:
    rows, lowest, notes = [], {}, []
    for panel in dict.fromkeys(line.panel for line in scores.lines):
        lines = [line for line in scores.lines if line.panel == panel]
        basins = {}
        for line in lines:
            if len(line.points) > 1:
                basin = find_basin(line.numbers, [point.scores for point in line.points])
                basins[line.label] = basin
                lowest[panel, line.label] = line.points[basin.lowest].x
                rows.append(_basin_row(line, basin))
        of_panel = [line for line in scores.references if line.panel in (panel, "")]
        notes += _shift_notes(panel, lines, basins, axis_name(x))
        notes += [_reference_note(panel, lines, reference) for reference in of_panel]
    rows += [
        (line.panel, line.label, "", in_words(point.mean), *("",) * (len(_BASIN) - 4))
        for line in scores.references
        for point in line.points
    ]
    if lowest:
        notes.append("Bottom: of the parabola through the lowest point and its neighbours.")
    if any(len(point.scores) > 1 for line in scores.lines for point in line.points):
        notes.append(
            "Its interval, and which values are as good (not told apart from the lowest), come "
            "from resampled seeds."
        )
    return Table(_BASIN, tuple(rows), tuple(notes), lowest)


def _basin_row(line: Line, basin: Basin) -> tuple[str, ...]:
    best = line.points[basin.lowest]
    neighbours = []
    for place in (basin.lowest - 1, basin.lowest + 1):
        if 0 <= place < len(line.points):
            neighbours.append(f"+{line.points[place].mean.value - best.mean.value:.3f}")
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
    panel: str, lines: Sequence[Line], basins: Mapping[str, Basin], name: str
) -> list[str]:
    """At the edge, and how far the best value moves from the first line to the last."""
    notes = []
    edges = [label for label, basin in basins.items() if basin.is_at_edge]
    if edges:
        of_lines = f" of {', '.join(edges)}" if any(edges) else ""
        text = f"the lowest point{of_lines} is at the edge of what was trained: the best {name} "
        notes.append(_said(panel, f"{text}may lie beyond it."))
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


def _reference_note(panel: str, lines: Sequence[Line], reference: Line) -> str:
    best = min(
        ((point.mean.value, line.label, point.x) for line in lines for point in line.points),
        key=lambda found: found[0],
    )
    difference = best[0] - reference.points[0].mean.value
    place = f"{best[1]} " if best[1] else ""
    side = "above" if difference > 0 else "below"
    text = f"the lowest score of the others ({place}at {short_tick(float(best[2]))}) is "
    return _said(panel, f"{text}{abs(difference):.3f} {side} that of {reference.label}.")


def _said(panel: str, text: str) -> str:
    """A sentence about a panel."""
    return f"{panel}: {text}" if panel else text[0].upper() + text[1:]


def _potential_table(scores: Scores) -> Table:
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
            rows_of_pairs += _potential_rows(panel, pair[labels[0]], pair[labels[1]])
    header = ("panel", "unique tokens", *labels, "data potential")
    note = (
        f"Data potential: the unique tokens that {labels[0]} needs for the score of {labels[1]}, "
        f"over those {labels[1]} has, between budgets by straight lines in logarithms. More than "
        "(>) or less than (<): no budget that was trained reaches it, so only this bound is known."
    )
    return Table(header, tuple(rows_of_pairs), (note,))


def _potential_rows(panel: str, first: Line, second: Line) -> list[tuple[str, ...]]:
    ours = {float(point.x): point for point in first.points}
    rows: list[tuple[str, ...]] = []
    for point in second.points:
        tokens = float(point.x)
        potential = potential_at(first.by_number, second.by_number, tokens)
        beside = in_words(ours[tokens].mean) if tokens in ours else ""
        rows.append((panel, short_tick(tokens), beside, in_words(point.mean), str(potential)))
    return rows
