"""Tidy tables of made-up runs whose law is known."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Loss = Callable[[float, float, float], float]
"""Of parameters, unique tokens and epochs."""


def chinchilla(parameters: float, unique_tokens: float, epochs: float) -> float:
    """A law whose best size grows as compute to the power 0.28 / 0.62."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / (unique_tokens * epochs) ** 0.28


def reports(
    run: str,
    *,
    parameters: float,
    unique_tokens: float,
    tokens: float,
    loss: Loss,
    noise: float = 0.0,
    seed: int = 0,
    num_reports: int = 12,
    batch_tokens: float = 8192.0,
    **labels: Any,
) -> list[dict[str, Any]]:
    """Rows of one run: validations evenly in the logarithm of tokens, up to `tokens`."""
    random = np.random.default_rng(seed)
    common = random.normal(0, noise)
    rows = []
    for seen in np.geomspace(tokens / 100, tokens, num_reports):
        fresh, epochs = min(seen, unique_tokens), max(seen / unique_tokens, 1.0)
        value = loss(parameters, fresh, epochs) * np.exp(common + random.normal(0, noise / 4))
        flops = 6 * parameters * 1.1
        rows.append(
            {
                **{"study": "made_up", "run": run, **labels},
                "num_parameters": int(1.2 * parameters),
                "training_flops_per_token": 1.2 * flops,
                "unique_tokens": int(unique_tokens),
                "commit": "abc1234",
                "num_parameters_without_embeddings": parameters,
                "flops_per_token_six_n": 6 * 1.2 * parameters,
                "flops_per_token_six_p_and_attention": flops,
                "step": int(seen / batch_tokens),
                "split": "valid",
                "tokens": int(seen),
                "epoch": seen / unique_tokens,
                "nelbo": value,
            }
        )
    return rows


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """As `study gather` writes it."""
    rows = list(rows)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def size_study(noise: float = 0.003) -> list[dict[str, Any]]:
    """Two objectives, seven sizes, fresh data; masked loses 5 % at every size."""
    rows = []
    for objective, factor in (("ar", 1.0), ("masked", 1.05)):

        def loss(*run: float, factor: float = factor) -> float:
            return factor * chinchilla(*run)

        for place, parameters in enumerate(np.geomspace(1e7, 1e9, 7)):
            rows += reports(
                f"{objective}_p{place}",
                parameters=float(parameters),
                unique_tokens=1e12,
                tokens=3e19 / (6.6 * float(parameters)) * 3,
                loss=loss,
                noise=noise,
                seed=place + 100 * (objective == "ar"),
                num_reports=40,
                objective=objective,
            )
    return rows
