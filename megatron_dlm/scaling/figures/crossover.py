"""Kind `crossover`: where one label of an axis passes another for good, for every other setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.scaling.figures.crossover_panels import Panel, draw_panels
from megatron_dlm.scaling.figures.crossover_settings import other_axes, settings_of
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.crossover_tables import (
    NUMBERS,
    header_of,
    notes_of,
    numbers_of,
    row_of,
)
from megatron_dlm.scaling.figures.drawn import Drawn, write_numbers
from megatron_dlm.scaling.figures.families import Grouping, bound_note, members_of
from megatron_dlm.scaling.figures.style import axis_name
from megatron_dlm.scaling.results import Results

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study


def draw(spec: CrossoverSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Compare both labels at every setting; raises ValueError where none has both.

    A setting whose curves cannot be compared is left out, with its reason.
    """
    results.check_columns(spec.metric, spec.x)
    settings, left_out = settings_of(spec, results, study)
    panels = [
        Panel(one.title, {spec.first: one.first, spec.second: one.second}, one.found)
        for one in settings
    ]
    pictures = draw_panels(
        panels,
        stem,
        x=spec.x,
        metric=spec.metric,
        direction=spec.direction,
        is_log=spec.x_scale == "log",
        highest=spec.highest,
    )
    axes = other_axes(spec, study)
    compared = (spec.first, spec.second, spec.x, spec.metric)
    numbers = write_numbers(
        stem.with_name(f"{stem.name}.csv"),
        (*axes, "first", "second", "x", "metric", *NUMBERS),
        [(*one.labels, *compared, *numbers_of(one)) for one in settings],
    )
    chosen = Grouping(seeds=spec.seeds, only={**spec.only, spec.axis: (spec.first, spec.second)})
    return Drawn(
        files=(*pictures, numbers),
        title=f"{spec.second} {spec.direction.past} {spec.first}: {axis_name(spec.metric)}",
        header=(*axes, *header_of(spec)),
        rows=tuple((*one.labels, *row_of(one)) for one in settings),
        notes=(
            *bound_note(members_of(results, study, chosen), spec.metric, study),
            *notes_of(spec, settings),
            *left_out,
        ),
    )
