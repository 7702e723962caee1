"""Kind `noise_profile`: the loss of diffusion by the share of tokens that are noised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.figures.drawn import Drawn, write_numbers
from megatron_dlm.scaling.figures.families import (
    Grouping,
    Member,
    grouped,
    interval_note,
    mean_over_seeds,
    members_of,
    refuse_twins,
)
from megatron_dlm.scaling.figures.scales import legend_above
from megatron_dlm.scaling.figures.style import look, new_panels, save
from megatron_dlm.scaling.results import Results, Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_dlm.scaling.study import Study

_COLUMN = re.compile(r"(nll|nelbo)_at_noise_([0-9.e-]+)-([0-9.]+)")
_Range = tuple[float, float]
_SHARE = "share of noised tokens"
_LOSS = "validation loss at this noise [nats per token]"
_MEANING = {
    "nll": "−log p of a masked token (columns nll_at_noise)",
    "nelbo": "the terms of the bound per token (columns nelbo_at_noise)",
}


@dataclass(frozen=True)
class NoiseProfileSpec(Grouping):
    """Keys of kind `noise_profile`."""

    steps: tuple[int, ...] = ()
    """A panel for every one of these steps; empty: one panel, at the last step of each run."""

    def __post_init__(self) -> None:
        require(
            not (self.steps and self.panels),
            f"steps and panels {self.panels} both ask for panels; give one of them",
        )


@dataclass(frozen=True)
class _Profile:
    """One line: means over its seeds [n] in n ranges of the noise."""

    panel: str
    label: str
    kind: str
    """nll or nelbo."""
    num_seeds: int
    edges: tuple[_Range, ...]
    mean: Floats
    low: Floats
    high: Floats

    @property
    def middles(self) -> list[float]:
        return [(low + high) / 2 for low, high in self.edges]


def draw(spec: NoiseProfileSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Write stem.png, .svg and .csv.

    Raises ValueError where no run has a profile, or none has reported at a step.
    """
    if not any(_COLUMN.fullmatch(name) for name in results.columns):
        raise ValueError(
            f"{results.source} has no columns nll_at_noise or nelbo_at_noise: they come from "
            "validations of diffusion with logging.noise_level_buckets above 0"
        )
    members = members_of(results, study, spec)
    refuse_twins(members, study, lambda member: (member.panel, member.line, member.seed))
    profiles, left_out = _profiles(members, spec, results.source)
    files = (*_picture(profiles, stem), _numbers(profiles, stem))
    notes = (
        *_meaning_notes(profiles),
        interval_note([profile.num_seeds for profile in profiles]),
        *left_out,
    )
    shown = sorted({edge for profile in profiles for edge in _shown(profile)})
    ranges = ("noise {:g} to {:g}".format(*edge) for edge in shown)
    header = ("panel", "line", "seeds", *ranges, "mean over the noise")
    rows = tuple(_row(profile, shown) for profile in profiles)
    return Drawn(files, f"{study.name}: loss by noise", header, rows, notes)


def _profiles(
    members: Sequence[Member], spec: NoiseProfileSpec, source: str
) -> tuple[list[_Profile], list[str]]:
    """By panel and line, and sentences about what has none."""
    found: list[_Profile] = []
    notes: dict[str, None] = {}
    without: dict[str, None] = {}
    for step in spec.steps or (None,):
        before = len(found)
        for of_line in grouped(members, lambda member: f"{member.panel}\n{member.line}").values():
            rows = {member.run: _row_at(member, step) for member in of_line}
            whole = {run: row for run, row in rows.items() if row is not None}
            without.update(dict.fromkeys(run for run in rows if run not in whole))
            title = of_line[0].panel if step is None else f"step {step:,}"
            profile = _profile(title, of_line[0].line, tuple(whole.values())) if whole else None
            if profile is not None:
                found.append(profile)
            elif whole:
                notes[f"Left out, for they share no range of the noise: {', '.join(whole)}."] = None
        if len(found) == before:
            reasons = "".join(f". {note}" for note in notes)
            raise ValueError(
                f"{source}: no run has a noise profile {_where(members, step)}{reasons}"
            )
    if without:
        notes[f"Left out, without a profile there: {', '.join(without)}."] = None
    return found, list(notes)


def _where(members: Sequence[Member], step: int | None) -> str:
    if step is None:
        return "at its last step"
    steps = sorted({row["step"] for member in members for row in member.rows})
    middle = steps[len(steps) // 2]
    return f"at step {step}; validations are at {steps[0]} to {steps[-1]}, such as {middle}"


def _row_at(member: Member, step: int | None) -> Row | None:
    """The validation of that step, or the last, if it has a profile."""
    rows = [row for row in member.rows if step is None or row["step"] == step]
    return rows[-1] if rows and _ranges(rows[-1]) else None


def _ranges(row: Row) -> dict[_Range, tuple[str, float]]:
    """Ends of a range -> (nll or nelbo, the loss there), by noise."""
    found = {}
    for name in row:
        match = _COLUMN.fullmatch(name)
        value = number(row, name) if match else None
        if match and value is not None:
            found[float(match[2]), float(match[3])] = (match[1], value)
    return dict(sorted(found.items()))


def _profile(panel: str, label: str, rows: Sequence[Row]) -> _Profile | None:
    """Over the ranges that every seed has; None where there is none."""
    tables = [_ranges(row) for row in rows]
    edges = tuple(edge for edge in tables[0] if all(edge in table for table in tables))
    if not edges:
        return None
    values = np.array([[table[edge][1] for edge in edges] for table in tables])
    kind = tables[0][edges[0]][0]
    return _Profile(panel, label, kind, len(rows), edges, *mean_over_seeds(values))


def _picture(profiles: Sequence[_Profile], stem: Path) -> tuple[Path, Path]:
    panels = list(dict.fromkeys(profile.panel for profile in profiles))
    labels = list(dict.fromkeys(profile.label for profile in profiles))
    width, height = (5.5, 3.8) if len(panels) == 1 else (3.6, 3.0)
    figure, places = new_panels(len(panels), width=width, height=height)
    for axes, panel in zip(places, panels, strict=True):
        for profile in profiles:
            if profile.panel == panel:
                _draw_profile(axes, profile, labels.index(profile.label))
        axes.set_title(panel)
        axes.set_xlim(0, 1)
    figure.supxlabel(_SHARE, fontsize=10)
    figure.supylabel(_LOSS, fontsize=10)
    legend_above(figure, places)
    return save(figure, stem)


def _draw_profile(axes: Axes, profile: _Profile, number_of_line: int) -> None:
    style = look(number_of_line)
    x = profile.middles
    axes.plot(x, profile.mean, linewidth=1.7, markersize=5, label=profile.label or None, **style)
    axes.fill_between(x, profile.low, profile.high, color=style["color"], alpha=0.18, linewidth=0)


def _numbers(profiles: Sequence[_Profile], stem: Path) -> Path:
    rows: list[tuple[str | float, ...]] = [
        (profile.panel, profile.label, profile.num_seeds, profile.kind, *edge, *map(float, values))
        for profile in profiles
        for edge, *values in zip(
            profile.edges, profile.mean, profile.low, profile.high, strict=True
        )
    ]
    header = ("panel", "line", "num_seeds", "kind", "noise_from", "noise_to", "loss", "low", "high")
    return write_numbers(stem.with_name(f"{stem.name}.csv"), header, rows)


def _shown(profile: _Profile) -> list[_Range]:
    """The first range, the middle one and the last."""
    return [profile.edges[place] for place in (0, len(profile.edges) // 2, -1)]


def _row(profile: _Profile, shown: Sequence[_Range]) -> tuple[str, ...]:
    """Empty where the line has another grid of ranges."""
    of_range = dict(zip(profile.edges, profile.mean.tolist(), strict=True))
    values = [f"{of_range[edge]:.3f}" if edge in of_range else "" for edge in shown]
    widths = [high - low for low, high in profile.edges]
    mean = float(np.average(profile.mean, weights=widths))
    return (profile.panel, profile.label, str(profile.num_seeds), *values, f"{mean:.3f}")


def _meaning_notes(profiles: Sequence[_Profile]) -> tuple[str, ...]:
    kinds = dict.fromkeys(profile.kind for profile in profiles)
    parts = []
    for kind in kinds:
        lines = dict.fromkeys(profile.label for profile in profiles if profile.kind == kind)
        of_lines = f" of {', '.join(lines)}" if len(kinds) > 1 else ""
        parts.append(f"{_MEANING[kind]}{of_lines}")
    return (f"The loss is {'; '.join(parts)}. Its mean over all noise is about the bound (NELBO).",)
