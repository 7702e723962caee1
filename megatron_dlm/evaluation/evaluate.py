"""The `evaluate` command: loss on shards, scores on lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_dlm.config.evaluation_commands import EvaluateConfig
from megatron_dlm.evaluation.every_checkpoint import each_checkpoint
from megatron_dlm.evaluation.likelihood import check_objective
from megatron_dlm.evaluation.plots import plot_noise_levels
from megatron_dlm.evaluation.report import announce, model_facts, with_error, write_json
from megatron_dlm.evaluation.shards import LogSNRPoint, ShardScore, evaluate_shards, is_exact
from megatron_dlm.hf.load import LoadedModel, load_model
from megatron_dlm.runtime.device import choose_device

_DATA_SAMPLES = 4


def evaluate(config: EvaluateConfig) -> None:
    """Print what was asked for, and write it to output_dir if there is one."""
    if config.tasks and find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-eval; install megatron-dlm with its extra [eval]")
    for one in each_checkpoint(config) if config.every_checkpoint else (config,):
        _evaluate_model(one)


def _evaluate_model(config: EvaluateConfig) -> None:
    device = choose_device(config.device)
    dtype = None if config.precision == "checkpoint" else config.precision
    model = load_model(config.model, device=device, dtype=dtype, step=config.step)
    check_objective(model)
    console = Console(highlight=False)
    if config.output_dir is not None:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if config.data:
        _evaluate_data(config, model, console)
    if config.tasks:
        from megatron_dlm.evaluation.tasks import evaluate_tasks  # imports lm-eval

        evaluate_tasks(config, model, console)


def _evaluate_data(config: EvaluateConfig, model: LoadedModel, console: Console) -> None:
    draws_figure = config.output_dir is not None and not is_exact(model)
    if draws_figure and find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed and draws the figure of output_dir; install "
                         "megatron-dlm with its extra [plot]")  # fmt: skip
    scores = [_score(config, model, prefix, console) for prefix in config.data]
    console.print(_table(scores))
    for score in scores:
        if score.levels:
            console.print(_level_table(score))
    if config.output_dir is None:
        return
    directory = Path(config.output_dir)
    facts = {**model_facts(model), "settings": config.data_settings}
    report = {**facts, "data": [asdict(score) for score in scores]}
    write_json(directory / "data.json", report)
    if draws_figure:
        labels = [f"{score.prefix}: {score.nats_per_token:.3f}" for score in scores]
        curves = {label: score.levels for label, score in zip(labels, scores, strict=True)}
        plot_noise_levels(curves, directory / "noise_levels.png", title=model.source)
    announce(console, directory)


def _score(config: EvaluateConfig, model: LoadedModel, prefix: str, console: Console) -> ShardScore:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(prefix, total=None)
        return evaluate_shards(
            model,
            prefix,
            limit=config.limit,
            num_samples=config.num_samples or _DATA_SAMPLES,
            batch_size=config.batch_size,
            seed=config.seed,
            watch=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _table(scores: Sequence[ShardScore]) -> Table:
    is_exact = scores[0].metric == "nll"
    title = "NLL, exact" if is_exact else "NELBO, an upper bound of the NLL"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("dataset", overflow="fold")
    for name in ("nats/token", "perplexity", "bits/byte", "windows", "tokens"):
        table.add_column(name, no_wrap=True)
    for score in scores:
        bits = "-"
        if score.bits_per_byte is not None:
            bits = with_error(score.bits_per_byte, score.bits_per_byte_standard_error)
        table.add_row(
            score.prefix,
            with_error(score.nats_per_token, score.standard_error),
            f"{score.perplexity:,.2f}",
            bits,
            f"{score.num_windows:,}",
            f"{score.num_tokens:,}",
        )
    return table


def _level_table(score: ShardScore) -> Table:
    title = f"\n{Path(score.prefix).name} by noise level"
    if not math.isnan(score.noise_standard_error):
        title += f" (noise: ± {score.noise_standard_error:.4f})"
    table = Table(title=title, title_justify="left", box=None)
    is_hybrid = isinstance(score.levels[0], LogSNRPoint)
    columns = ("log-SNR", "nats/token/log-SNR") if is_hybrid else ("masked", "nats/masked token")
    for name in (*columns, "draws"):
        table.add_column(name, no_wrap=True, min_width=12)
    for point in score.levels:
        if isinstance(point, LogSNRPoint):
            level, loss = f"{point.log_snr:+.2f}", point.nats_per_token_and_log_snr
        else:
            level, loss = f"{point.level:.1%}", point.nats_per_masked_token
        table.add_row(level, with_error(loss, point.standard_error), f"{point.num_draws:,}")
    return table
