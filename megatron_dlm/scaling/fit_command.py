"""`scaling fit`: from tidy tables to the file of a law."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dlm.config.scaling_commands import ScalingFitConfig
from megatron_dlm.scaling.fit_laws import fit_runs
from megatron_dlm.scaling.law_file import Fit, LawFile, Setting, Source, write_law
from megatron_dlm.scaling.measured_runs import MeasuredRun, measured_runs

FORMULAS = {
    "isoflop": "best FLOPs per token, tokens, parameters and loss = A C^a, C the training FLOPs",
    "chinchilla": "L = E + A / N^alpha + B / D^beta, D tokens with repeats; e, a, b as logarithms",
    "repeated": "as chinchilla with D = U (1 + R (1 - exp(-(epochs - 1) / R)))",
    "overfitted": "as repeated, plus (epochs N^mu / (K U^nu))^gamma",
    "power": "y = A x^a",
    "batch": "best batch in tokens = A D^a, D the tokens trained on",
    "learning_rate": "best learning rate = A B^a, B the batch in tokens",
}


def fit_scaling(config: ScalingFitConfig) -> None:
    """Write the law and print it; ValueError where the tables lack what it needs.

    A label without a law has its reason in the file, and is named by the ValueError at the end.
    """
    runs = measured_runs(config)
    fits, without_law = [], {}
    for label in dict.fromkeys(run.label for run in runs):
        of_label = [run for run in runs if run.label == label]
        try:
            _refuse_mixed(config, of_label)
            fits.append(fit_runs(config, label, of_label))
        except ValueError as error:
            if not config.by:
                raise
            without_law[label] = str(error)
    faults = "; ".join(f"{config.by} {label}: {reason}" for label, reason in without_law.items())
    if not fits:
        raise ValueError(faults)
    file = LawFile(config.law, config.by, _source(config, runs), tuple(fits), without_law)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_law(output, file)
    _tell(file, output)
    if faults:
        raise ValueError(f"{output} holds the others and no law of {faults}")


def _refuse_mixed(config: ScalingFitConfig, runs: Sequence[MeasuredRun]) -> None:
    """Losses of two objectives are no one law: the bound of diffusion lies above the loss of AR."""
    if config.law == "power" and config.y is not None:
        return
    for column in ("objective.kind", "objective"):
        found = dict.fromkeys(str(r[column]) for run in runs for r in run.rows if r.get(column))
        if len(found) > 1:
            raise ValueError(
                f"the runs are of {column} {' and '.join(found)}, which share no law of the loss; "
                f"give --by {column}, or --only.{column} {next(iter(found))}"
            )
        if found:
            return


def _source(config: ScalingFitConfig, runs: Sequence[MeasuredRun]) -> Source:
    def values_of(column: str) -> tuple[str, ...]:
        found = {str(row[column]) for run in runs for row in run.rows if row.get(column)}
        return tuple(sorted(found))

    settings: dict[str, Setting] = {
        "resamples": config.resamples,
        "seed": config.seed,
        "uncommitted_changes": any(row.get("uncommitted_changes") for r in runs for row in r.rows),
        **{f"only.{column}": value for column, value in config.only.items()},
    }
    if config.law == "isoflop":
        settings |= {"models": config.models, "weighting": config.weighting}
        settings |= {"budgets": config.budgets, "num_budgets": config.num_budgets}
    if config.law == "batch":
        settings |= {"num_levels": config.num_levels}
    if config.law == "power":
        settings |= {"x": config.x, "y": config.y or config.metric}
    return Source(
        tables=tuple(config.results),
        studies=values_of("study"),
        commits=values_of("commit"),
        metric=config.metric,
        score=config.score,
        convention=config.convention,
        parameters=config.parameters,
        settings=settings,
    )


def _tell(file: LawFile, output: Path) -> None:
    console = Console()
    table = Table(title=f"{file.law}: {FORMULAS[file.law]}", title_justify="left")
    if file.by is not None:
        table.add_column(escape(file.by))
    for column in ("number", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "number" else "right")
    for fit in file.fits:
        for place, (name, number) in enumerate(fit.numbers.items()):
            own = [escape(fit.label if place == 0 else "")] if file.by is not None else []
            interval = f"{number.low:.4g} to {number.high:.4g}"
            table.add_row(*own, name, f"{number.value:.4g}", interval)
        table.add_section()
    console.print(table)
    for fit in file.fits:
        console.print(escape(_sentence(file, fit)), highlight=False, soft_wrap=True)
        for note in fit.notes:
            console.print(f"  {escape(note)}", highlight=False, soft_wrap=True)
    source = file.source
    console.print(
        f"FLOPs: {source.convention}; parameters: {source.parameters}; loss: {source.score} "
        f"{source.metric} of a run; intervals: {source.settings['resamples']} resamples.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    print(output)


def _sentence(file: LawFile, fit: Fit) -> str:
    """What was measured, and how well the law describes it."""
    ranges = ", ".join(
        f"{name} {low:.3g}" + (f" to {high:.3g}" if high > low else "")
        for name, (low, high) in fit.ranges.items()
    )
    goodness = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in fit.goodness.items()
    )
    label = f"{fit.label}: " if file.by is not None else ""
    return f"{label}{fit.num_runs} runs; {goodness}; measured on {ranges}"
