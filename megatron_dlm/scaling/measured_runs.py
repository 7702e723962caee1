"""What `scaling fit` takes from tidy tables: every run with its curve and the facts of laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.config.scaling_commands import ScalingFitConfig
from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.results import Results, Row, curve_of, number, read_results

PARAMETERS_COLUMNS = {
    "without_embeddings": "num_parameters_without_embeddings",
    "all": "num_parameters",
}
FLOPS_COLUMNS = {
    "six_n": "flops_per_token_six_n",
    "six_p_and_attention": "flops_per_token_six_p_and_attention",
    "fine": "training_flops_per_token",
}
"""Convention -> column of FLOPs per token."""


@dataclass(frozen=True)
class MeasuredRun:
    """One run, its validations in order."""

    name: str
    label: str
    """Its value in the column that laws are divided by."""
    rows: tuple[Row, ...]
    source: str
    """The tables, for messages."""
    tokens: Floats
    """[n], rising."""
    losses: Floats
    """[n]"""
    scored: int
    """Place of the validation that counts as the loss of the run."""
    parameters_column: str
    flops_column: str

    def fact(self, column: str) -> float:
        """Of the validation that counts; ValueError, with the remedy, where the table lacks it."""
        value = number(self.rows[self.scored], column)
        if value is None:
            raise ValueError(f"{self.source}: run {self.name} has no {column}; {_remedy(column)}")
        return value

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.losses[self.scored])

    @property
    def parameters(self) -> float:
        """As the configuration of the fit counts them."""
        return self.fact(self.parameters_column)

    @property
    def flops_per_token(self) -> float:
        """In the convention of the fit."""
        return self.fact(self.flops_column)

    @property
    def batch_tokens(self) -> float:
        """Tokens of one step."""
        return float(self.tokens[self.scored]) / self.fact("step")

    @property
    def unique_and_epochs(self) -> tuple[float, float]:
        """Unique tokens that were seen, and how often; a part of the data is seen once."""
        tokens, unique = float(self.tokens[self.scored]), self.fact("unique_tokens")
        return min(tokens, unique), max(tokens / unique, 1.0)


def measured_runs(config: ScalingFitConfig) -> list[MeasuredRun]:
    """The runs of the tables with two validations or more.

    Raises ValueError where a table has no such column, or no run is left.
    """
    text_columns = [] if config.by is None else [config.by]
    paths = [Path(name) for name in config.results]
    results = read_results(*paths, text_columns=text_columns)
    results.check_columns(config.metric, "tokens")
    for column in [*config.only, *text_columns]:
        results.check_columns(column)
    results = _chosen(results, config)
    found = []
    for name, rows in results.runs().items():
        run = _measured(name, rows, results.source, config)
        if run is not None:
            found.append(run)
    if not found:
        raise ValueError(
            f"{results.source}: no run has two validations with {config.metric}; run the study on"
        )
    return found


def _chosen(results: Results, config: ScalingFitConfig) -> Results:
    for column, text in config.only.items():
        rows = tuple(row for row in results.rows if _is(row.get(column), text))
        if not rows:
            values = dict.fromkeys(str(row.get(column)) for row in results.rows)
            raise ValueError(
                f"only.{column} is {text}, which no run has; have: {', '.join(values)}"
            )
        results = Results(rows, results.source)
    return results


def _is(value: object, text: str) -> bool:
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def _measured(
    name: str, rows: Sequence[Row], source: str, config: ScalingFitConfig
) -> MeasuredRun | None:
    """None where the run has fewer than two validations."""
    known: list[Row] = []
    for row in rows:
        tokens, loss = number(row, "tokens"), number(row, config.metric)
        if tokens is None or loss is None or (known and tokens <= known[-1]["tokens"]):
            continue
        known.append(row)
    curve = curve_of(known, "tokens", config.metric)
    if curve is None:
        return None
    return MeasuredRun(
        name=name,
        label="" if config.by is None else str(known[-1].get(config.by)),
        rows=tuple(known),
        source=source,
        tokens=curve.x,
        losses=curve.y,
        scored=len(known) - 1 if config.score == "last" else int(curve.y.argmin()),
        parameters_column=PARAMETERS_COLUMNS[config.parameters],
        flops_column=FLOPS_COLUMNS[config.convention],
    )


def _remedy(column: str) -> str:
    gather = "gather the study again with this version"
    remedies = {
        "num_parameters_without_embeddings": f"{gather}, or fit with --parameters all",
        "flops_per_token_six_n": f"{gather}, or fit with --convention fine",
        "flops_per_token_six_p_and_attention": f"{gather}, or fit with --convention fine",
        "optimizer.lr": "the study needs an axis that changes optimizer.lr",
    }
    return remedies.get(column, gather)
