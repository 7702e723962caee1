"""Run directories that begin with weights made elsewhere: imported, or grown from a dense model."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.retention import whole_checkpoints
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig


def refuse_used_directory(output: Path, settings_file: str) -> None:
    """ValueError where a run or foreign files are; what an interrupted try left may be replaced.

    settings_file: what the command writes there first, by which it knows its own.
    """
    whole, _ = whole_checkpoints(output / "checkpoints")
    if whole:
        raise ValueError(
            f"output_dir {output} holds a run (its newest checkpoint is {whole[-1].path.name}); "
            "name another directory"
        )
    if output.is_dir() and any(output.iterdir()) and not (output / settings_file).exists():
        raise ValueError(f"output_dir {output} holds other files; name a new directory")


def implied_settings(
    model: ModelConfig, objective: ObjectiveConfig, tokenizer: str | None, output: Path
) -> dict[str, Any]:
    """The part of the run's configuration that the weights imply."""
    settings: dict[str, Any] = {
        "model": _changed(model, ModelConfig()),
        "objective": {"kind": objective.kind, **_changed(objective, ObjectiveConfig())},
        "train": {"output_dir": str(output)},
    }
    if tokenizer is not None:
        settings["data"] = {"tokenizer": tokenizer}
    return settings


def _changed(section: Any, default: Any) -> dict[str, Any]:
    """Fields, also of sections inside, that are not the default: no more is implied."""
    changed = {}
    for item in fields(section):
        value, standard = getattr(section, item.name), getattr(default, item.name)
        if value != standard:
            inside = is_dataclass(value)
            changed[item.name] = _changed(value, standard) if inside else value
    return changed
