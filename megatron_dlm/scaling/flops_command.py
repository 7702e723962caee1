"""`scaling flops`: the cost of a run by every convention, and of generating with its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.commands import PlanConfig
from megatron_dlm.config.derive import resolve
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.scaling_commands import ScalingFlopsConfig
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.flops import (
    GenerationFlops,
    TrainingFlops,
    generation_flops,
    training_flops,
)
from megatron_dlm.scaling.plan_run import make_plan

_MEANING = {
    "six_n": "6 x all parameters that a token meets (Quokka, Hoffmann et al. 2022)",
    "six_p_and_attention": "6 x parameters without embeddings + 12 L d S (SBD)",
    "fine": "every matrix product: output layer on scored slots, attention on the keys it sees",
}
_ASSUMED = (
    "A multiply-add counts 2; the backward pass is twice the forward pass, recomputation is not "
    "counted.",
    "Autoregressive: keys and values are cached, every token and the prompt are computed once.",
    "Diffusion: no cache; every step computes prompt and new tokens whole, the output layer on all "
    "new slots.",
    "Published (SDL, 1B parameters, no prompt, one step per token): 16 times for 16 tokens to "
    "4,700 times for 4,096. Fewer steps and cached blocks cost less (docs/generation.md).",
)


@dataclass(frozen=True)
class Training:
    """Of the whole run."""

    tokens: int
    flops: TrainingFlops
    gpu_hours: float
    kilowatt_hours: float | None


@dataclass(frozen=True)
class Generation:
    """Of one text."""

    new_tokens: int
    num_steps: int
    """Of diffusion."""
    flops: GenerationFlops


def flops_scaling(config: ScalingFlopsConfig) -> None:
    """Print both tables; ValueError for a configuration without a vocabulary size."""
    config = resolve(config)  # type: ignore[assignment]
    per_token = training_flops(config.model, config.objective)
    training = _training(config, per_token)
    generation = [
        Generation(
            tokens,
            steps or tokens,
            generation_flops(
                config.model,
                new_tokens=tokens,
                prompt_tokens=config.prompt_tokens,
                num_steps=steps,
            ),
        )
        for tokens in config.new_tokens
        for steps in (None, *config.num_steps)
    ]
    if config.output is not None:
        _write(config, per_token, training, generation)
    _tell(config, per_token, training, generation)


def _training(config: ScalingFlopsConfig, per_token: TrainingFlops) -> Training | None:
    """None where the configuration does not say how long the run is."""
    length = make_plan(config, PlanConfig(num_gpus=config.parallel.model_parallel_size)).length
    if length is None:
        return None
    tokens = length.tokens
    totals = {item.name: getattr(per_token, item.name) * tokens for item in fields(per_token)}
    flops = TrainingFlops(**totals)
    hours = flops.fine / (GPUS[config.gpu].peak_flops * config.mfu) / 3600
    energy = None if config.gpu_watts is None else hours * config.gpu_watts / 1e3
    return Training(tokens, flops, hours, energy)


def _write(
    config: ScalingFlopsConfig,
    per_token: TrainingFlops,
    training: Training | None,
    generation: Sequence[Generation],
) -> None:
    content = {
        "training_flops_per_token": asdict(per_token),
        "training": None if training is None else asdict(training),
        "generation": [
            {
                **{"new_tokens": each.new_tokens, "num_steps": each.num_steps},
                **{**asdict(each.flops), "ratio": each.flops.ratio},
            }
            for each in generation
        ],
        "gpu": config.gpu,
        "mfu": config.mfu,
        "prompt_tokens": config.prompt_tokens,
        "assumptions": list(_ASSUMED),
    }
    assert config.output is not None
    write_whole(Path(config.output), json.dumps(content, indent=1) + "\n")


def _tell(
    config: ScalingFlopsConfig,
    per_token: TrainingFlops,
    training: Training | None,
    generation: Sequence[Generation],
) -> None:
    console = Console()
    table = Table(title=f"training FLOPs, {config.objective.kind}", title_justify="left")
    table.add_column("convention")
    for column in ("per token", *(["of the run"] if training else []), "to fine"):
        table.add_column(column, justify="right")
    for name in _MEANING:
        value = getattr(per_token, name)
        total = [f"{getattr(training.flops, name):.4g}"] if training else []
        table.add_row(name, f"{value:.4g}", *total, f"{value / per_token.fine:.3f}")
    console.print(table)
    for name, meaning in _MEANING.items():
        console.print(f"{name}: {meaning}", style="dim", highlight=False, soft_wrap=True)
    if training is None:
        console.print("length unknown: give train.steps, train.tokens or train.epochs")
    else:
        energy = training.kilowatt_hours
        power = f", {energy:,.4g} kWh at {config.gpu_watts:g} W" if energy is not None else ""
        console.print(
            f"{training.tokens:,} tokens: {training.gpu_hours:,.4g} {config.gpu} hours at MFU "
            f"{config.mfu:g} of the fine count{power}",
            highlight=False,
            soft_wrap=True,
        )
    title = f"generation FLOPs, {config.prompt_tokens} prompt tokens"
    table = Table(title=title, title_justify="left")
    for column in ("new tokens", "AR with cache", "diffusion steps", "diffusion", "times"):
        table.add_column(column, justify="right")
    for each in generation:
        is_first = each.num_steps == each.new_tokens
        own = (f"{each.new_tokens:,}", f"{each.flops.autoregressive:.4g}") if is_first else ("", "")
        ratio = f"{each.flops.ratio:,.4g}"
        table.add_row(*own, f"{each.num_steps:,}", f"{each.flops.diffusion:.4g}", ratio)
    console.print(table)
    for line in _ASSUMED:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
