"""Results for the eye and for files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.runtime.files import write_whole


def with_error(value: float, error: float | None) -> str:
    """A number and its standard error, where there is one."""
    has_error = error is not None and not math.isnan(error)
    return f"{value:.4f} ± {error:.4f}" if has_error else f"{value:.4f}"


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """What every report begins with: which weights were evaluated."""
    return {
        "model": model.source,
        "objective": model.objective_kind,
        "step": model.facts.get("step"),
    }


def announce(console: Console, directory: Path) -> None:
    """Say where the results are."""
    console.print(f"written to {directory}", markup=False, soft_wrap=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON: what is not a number is null."""
    write_whole(path, json.dumps(_strict(content), indent=2, ensure_ascii=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
