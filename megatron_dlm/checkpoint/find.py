"""Which checkpoint a user means by a directory, and which model it holds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.damage import check
from megatron_dlm.checkpoint.retention import Checkpoint, whole_checkpoints
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig


def find_checkpoint(path: Path, step: int | None = None, *, verify: bool = True) -> Checkpoint:
    """The newest whole checkpoint of a run directory, that of `step`, or a checkpoint directory.

    Raises ValueError when there is none, or when its files do not have the checksums that were
    written (`verify`; about 1.7 GB/s a core).
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a run directory or one of its checkpoints")
    if path.name.startswith("iter_"):
        whole, warnings = whole_checkpoints(path.parent)
        whole = [found for found in whole if found.path == path]
        warnings = [warning for warning in warnings if str(path) in warning]
    else:
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        whole, warnings = whole_checkpoints(root)
    if step is not None:
        steps = [found.step for found in whole]
        whole = [found for found in whole if found.step == step]
        if not whole:
            raise ValueError(f"{path} holds no whole checkpoint of step {step} (has {steps})")
    if not whole:
        hint = warnings[-1] if warnings else "train first, or name another directory"
        raise ValueError(f"{path} holds no whole checkpoint; {hint}")
    if verify:
        check(whole[-1])
    return whole[-1]


def model_of(checkpoint: Checkpoint) -> tuple[ModelConfig, ObjectiveConfig]:
    """The sections `model` and `objective` that a checkpoint was made with."""
    config = checkpoint.manifest["config"]
    return (
        _section(ModelConfig, config["model"], checkpoint.path),
        _section(ObjectiveConfig, config["objective"], checkpoint.path),
    )


def _section(kind: Any, values: dict[str, Any], path: Path) -> Any:
    known = {field.name for field in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(
            f"{path} was made by a newer megatron-dlm: {kind.__name__} has no "
            f"{', '.join(unknown)}; update"
        )
    if "moe" in values:
        values = {**values, "moe": _section(MoEConfig, values["moe"], path)}
    return kind(**values)
