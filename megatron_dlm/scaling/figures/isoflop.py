"""Kind `isoflop`: loss against size at equal compute, and the best size, data and loss as laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.figures.drawn import Drawn, in_short, write_numbers
from megatron_dlm.scaling.figures.families import (
    Grouping,
    Member,
    bound_note,
    grouped,
    members_of,
    refuse_twins,
    smoothing_words,
)
from megatron_dlm.scaling.figures.isoflop_picture import Family, draw_families
from megatron_dlm.scaling.figures.style import axis_name, save
from megatron_dlm.scaling.isoflop import (
    NAMES,
    ComputeOptimal,
    Trained,
    TrainingCurve,
    at_budgets,
    budgets_of,
    fit_compute_optimal,
    lowest_models,
    optima_of,
    unreached,
)
from megatron_dlm.scaling.measured_runs import FLOPS_COLUMNS
from megatron_dlm.scaling.results import Results, curve_of, number

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

_CONVENTIONS = {
    "fine": "every matrix product as computed",
    "six_p_and_attention": "6 P + 12 L a S per token, without embeddings",
    "six_n": "6 N per token, embeddings included",
}
_SAME_BUDGET = 0.05
"""Runs whose compute differs by less than this share were meant to have one budget."""
_HEADER = ("line", "against compute", "law", "exponent, 95 % interval", "budgets")


@dataclass(frozen=True)
class IsoflopSpec(Grouping):
    """Keys of kind `isoflop`: a panel of parabolas for every line, then the laws of all lines."""

    size: Literal["num_parameters", "num_parameters_without_embeddings", "flops_per_token"] = (
        "num_parameters"
    )
    """What the best size is told in."""
    flops: Literal["fine", "six_p_and_attention", "six_n"] = "fine"
    """Convention by which compute is counted (docs/scaling.md)."""
    read: Literal["curves", "last"] = "curves"
    """curves: read every run at every budget, which asks for learning rates that are not annealed;
    last: only at the end of every run."""
    models: Literal["all", "best"] = "all"
    """all: every run counts, and runs of a line differ in size and seed only; best: the lowest loss
    of each size and seed at a budget, whatever else differs, such as batch and learning rate."""
    budgets: int | tuple[float, ...] = 5
    """Budgets of compute in FLOPs; a number: that many, evenly in logarithms, within what the
    curves of four sizes cover, or of three with two runs each; only those have laws. Where no four
    overlap three do, for parabolas alone. Where the last is read, a run's own compute tells its
    budget."""
    metric: str = "nelbo"
    """Column of the validations, lower is better."""
    smoothing: float = 0.0
    """Standard deviation of a Gaussian average over a curve, in the natural logarithm of tokens:
    0.1 averages over some 10 %; 0: none."""
    resamples: int = 1000
    """Bootstrap resamples of the runs."""

    def __post_init__(self) -> None:
        require(self.panels is None, "isoflop has a panel for every line; leave panels out")
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")
        require(self.resamples > 0, f"resamples is {self.resamples}; it must be greater than 0")
        if isinstance(self.budgets, int):
            require(self.budgets > 0, f"budgets is {self.budgets}; it must be greater than 0")
        else:
            require(all(budget > 0 for budget in self.budgets), "budgets must be greater than 0")


def draw(spec: IsoflopSpec, results: Results, study: Study, stem: Path) -> Drawn:
    """Write stem.png, .svg and .csv; raises ValueError where no run reached a budget."""
    results.check_columns("tokens", spec.metric, FLOPS_COLUMNS[spec.flops], _size_column(spec))
    members = members_of(results, study, spec)
    if spec.models == "all":
        refuse_twins(members, study, lambda member: _place(member, spec))
    by_line = {
        line: [
            [found for member in of_seed if (found := _curve(member, spec)) is not None]
            for of_seed in grouped(of_line, lambda member: member.seed).values()
        ]
        for line, of_line in grouped(members, lambda member: member.line).items()
    }
    of_lines = [list(chain.from_iterable(seeds)) for seeds in by_line.values()]
    budgets = _budgets([curves for curves in of_lines if curves], spec)
    families: list[Family] = []
    notes: list[str] = []
    for line, seeds in by_line.items():
        models = [model for curves in seeds for model in _models(curves, budgets, spec)]
        if models:
            families.append(_family(line, models, spec, notes))
            _tell_left_out(families[-1], budgets, notes, _size_name(spec))
    if not families:
        raise ValueError(f"{results.source}: no run reaches one of the budgets; train longer")
    figure = draw_families(families, size_name=_size_name(spec), loss_name=axis_name(spec.metric))
    files = (*save(figure, stem), _numbers(families, stem))
    rows = tuple(row for family in families for row in _rows(family))
    title = f"{study.name}: compute-optimal {_size_name(spec)}"
    notes = [*bound_note(members, spec.metric, study), *_method_notes(spec), *notes]
    return Drawn(files, title, _HEADER, rows, tuple(notes))


def _place(member: Member, spec: IsoflopSpec) -> tuple[str, str, float | None, int]:
    """Line, seed, size and, where a run stands for its last report only, how long that one was."""
    last = member.rows[-1]
    length = 0
    if spec.read == "last":
        length = round(np.log(number(last, "tokens") or 1.0) / _SAME_BUDGET)
    return member.line, member.seed, number(last, _size_column(spec)), length


def _size_column(spec: IsoflopSpec) -> str:
    return FLOPS_COLUMNS[spec.flops] if spec.size == "flops_per_token" else spec.size


def _size_name(spec: IsoflopSpec) -> str:
    names = {
        "num_parameters": "parameters",
        "num_parameters_without_embeddings": "parameters without embeddings",
        "flops_per_token": "training FLOPs per token",
    }
    return names[spec.size]


def _curve(member: Member, spec: IsoflopSpec) -> TrainingCurve | None:
    """The validations of one run; None where it has fewer than two."""
    rows = [row for row in member.rows if (number(row, "tokens") or 0) > 0]
    curve = curve_of(rows, "tokens", spec.metric)
    last = member.rows[-1]
    size, flops = number(last, _size_column(spec)), number(last, FLOPS_COLUMNS[spec.flops])
    if curve is None or size is None or flops is None:
        return None
    curve = curve.smoothed(spec.smoothing)
    return TrainingCurve(member.run, size, flops, curve.x, curve.y)


def _budgets(lines: Sequence[Sequence[TrainingCurve]], spec: IsoflopSpec) -> list[float]:
    """The same for all lines, within what the sizes of each cover."""
    if not isinstance(spec.budgets, int):
        return sorted(spec.budgets)
    if spec.read == "last":
        return _clusters([float(curve.compute_flops[-1]) for curves in lines for curve in curves])
    return budgets_of(lines, spec.budgets, one_per_size=spec.models == "best")


def _clusters(values: Sequence[float]) -> list[float]:
    """Geometric means of groups of values that are about the same."""
    groups: list[list[float]] = []
    for value in sorted(values):
        if groups and value <= groups[-1][0] * (1 + _SAME_BUDGET):
            groups[-1].append(value)
        else:
            groups.append([value])
    return [float(np.exp(np.mean(np.log(group)))) for group in groups]


def _models(
    curves: Sequence[TrainingCurve], budgets: Sequence[float], spec: IsoflopSpec
) -> list[Trained]:
    """Of the runs of one seed."""
    read = at_budgets if spec.read == "curves" else _at_the_end
    models = read(curves, budgets)
    return lowest_models(models) if spec.models == "best" else models


def _at_the_end(curves: Sequence[TrainingCurve], budgets: Sequence[float]) -> list[Trained]:
    """The runs whose own compute is about that of a budget."""
    found = []
    for curve in curves:
        compute = float(curve.compute_flops[-1])
        budget = min(budgets, key=lambda budget: abs(np.log(budget / compute)))
        if abs(budget / compute - 1) <= _SAME_BUDGET:
            loss, tokens = float(curve.loss_nats[-1]), float(curve.tokens[-1])
            found.append(Trained(budget, curve.size, loss, curve.run, tokens))
    return found


def _family(line: str, models: list[Trained], spec: IsoflopSpec, notes: list[str]) -> Family:
    """The line with its laws, as far as there are any; why not goes to the notes."""
    laws: ComputeOptimal | None = None
    start = f"{line}: " if line else ""
    try:
        laws = fit_compute_optimal(models, count=spec.resamples)
    except ValueError as error:
        notes.append(f"{start}no laws ({error}).")
    return Family(line, tuple(models), optima_of(models)[0], laws)


def _tell_left_out(
    family: Family, budgets: Sequence[float], notes: list[str], size_name: str
) -> None:
    left_out = unreached(family.models, budgets)
    if len(family.optima) >= 2:  # with fewer the reasons are told already, as there are no laws
        without_optimum = optima_of(family.models)[1]
        left_out |= {b: f"{why} (sizes in {size_name})" for b, why in without_optimum.items()}
    start = f"{family.label}: " if family.label else ""
    for budget, reason in sorted(left_out.items()):
        notes.append(f"{start}{budget:.3g} FLOPs left out of the laws: {reason}.")


def _numbers(families: Sequence[Family], stem: Path) -> Path:
    rows: list[tuple[str | float | int | None, ...]] = []
    for family in families:
        for model in family.models:
            numbers = (model.compute_flops, model.size, model.data, model.loss_nats)
            rows.append((family.label, "model", model.run, *numbers))
        for best in family.optima:
            numbers = (best.compute_flops, best.size, best.data, best.loss_nats)
            rows.append((family.label, "optimum", None, *numbers))
    header = ("line", "kind", "run", "compute_flops", "size", "tokens", "loss_nats")
    return write_numbers(stem.with_name(f"{stem.name}.csv"), header, rows)


def _rows(family: Family) -> list[tuple[str, ...]]:
    laws = family.laws
    if laws is None:
        return [(family.label, "", "no laws", "", str(len(family.optima)))]
    of_name = {"size": laws.size, "data": laws.data, "loss": laws.loss}
    rows: list[tuple[str, ...]] = []
    for name in NAMES:
        law, sure = of_name[name], laws.intervals[name]
        words = f"{sure.value:.3f} [{sure.low:.3f}, {sure.high:.3f}]"
        form = f"{in_short(law.coefficient)} C^{law.exponent:.3f}"
        rows.append((family.label, name, form, words, str(len(laws.optima))))
    return rows


def _method_notes(spec: IsoflopSpec) -> list[str]:
    smoothed = ""
    if spec.smoothing:
        smoothed = f", smoothed over {smoothing_words(spec.smoothing, 'tokens')}"
    read = {
        "curves": f"Losses are read off the curves of each run{smoothed}, which compares sizes "
        "only where the learning rate is not annealed.",
        "last": "Losses are those at the end of each run.",
    }
    chosen = (
        "Of the runs of one size and seed the one with the lowest loss stands at each budget; the "
        "lowest of many is a little too low by chance.",
    )
    return [
        f"Compute counts {_CONVENTIONS[spec.flops]}.",
        read[spec.read],
        *(chosen if spec.models == "best" else ()),
        "Stars are the lowest points of parabolas in log size; dashed parabolas have theirs "
        "outside of the trained sizes, or too few runs to judge it by, and are left out of the "
        "laws.",
        "Bands: 95 %, by a wild bootstrap over runs. The law of the loss has no irreducible part: "
        "points that bend away from its line show one.",
    ]
