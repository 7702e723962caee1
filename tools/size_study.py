"""What the coordinate check and the learning-rate sweep share, without Megatron Core."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parse import parse

PARAMETRIZATIONS = ("standard", "completep")


def run_study(
    config_class: type[Any],
    argv: Sequence[str] | None,
    *,
    name: str,
    measure: Callable[[Any], list[Any]],
    draw: Callable[[list[Any], Path], None],
    tell: Callable[[list[Any]], None],
) -> int:
    """Measure, write `name`.csv and `name`.png into the output directory; the exit status."""
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, f"{name}.py")
        rows = measure(config)
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_csv(rows, directory / f"{name}.csv")
        draw(rows, directory / f"{name}.png")
        tell(rows)
    except (ValueError, OSError) as error:
        print(f"{name}.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def default_model() -> ModelConfig:
    """The architecture that the constants of CompleteP were found for, narrow and shallow."""
    return ModelConfig(
        num_layers=4,
        hidden_size=128,
        kv_channels=32,
        seq_length=64,
        activation="squared_relu",
        mlp_bias=True,
        qk_layernorm_scope="full",
        untie_embeddings_and_output_weights=True,
        output_init_std=0.0,
    )


def default_optimizer(lr: float) -> OptimizerConfig:
    """LaProp under CompleteP."""
    return OptimizerConfig(
        kind="laprop", parametrization="completep", lr=lr, weight_decay=0.0, adam_beta2=0.99
    )


def matched_optimizer(
    given: OptimizerConfig, parametrization: str, base_width: int
) -> OptimizerConfig:
    """`given` in this parametrization, with the same rate of the matrices at the base width."""
    if parametrization == "completep":
        return replace(given, parametrization="completep")
    default = OptimizerConfig()
    return replace(
        given,
        parametrization="standard",
        lr=given.lr / base_width,
        bulk_init_scale=default.bulk_init_scale,
        auxiliary_lr_scale=default.auxiliary_lr_scale,
    )


def require_sizes(**values: Sequence[float] | float) -> None:
    """Raise ValueError for a field that is empty or has a value of 0 or less."""
    for name, given in values.items():
        numbers = [given] if isinstance(given, (int, float)) else list(given)
        require(
            bool(numbers) and min(numbers) > 0, f"{name} is {given}; every value must be above 0"
        )


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Dataclasses of one kind, a line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(vars(rows[0])))
        table.writeheader()
        table.writerows(vars(row) for row in rows)
