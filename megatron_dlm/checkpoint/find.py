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
    whole, warnings = _candidates(path)
    if step is not None:
        steps = [found.step for found in whole]
        whole = [found for found in whole if found.step == step]
        if not whole:
            raise ValueError(f"{path} holds no whole checkpoint of step {step} (has {steps})")
    if not whole:
        raise ValueError(_nothing_in(path, warnings))
    if verify:
        check(whole[-1])
    return whole[-1]


def find_checkpoints(path: Path) -> list[Checkpoint]:
    """All whole checkpoints of a run directory, by step, without reading them.

    Raises ValueError when there is none.
    """
    whole, warnings = _candidates(path)
    if not whole:
        raise ValueError(_nothing_in(path, warnings))
    return whole


def _candidates(path: Path) -> tuple[list[Checkpoint], list[str]]:
    """What a directory may mean, by step, and warnings about what is not whole."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a run directory or one of its checkpoints")
    if path.name.startswith("iter_"):
        whole, warnings = whole_checkpoints(path.parent)
        whole = [found for found in whole if found.path == path]
        return whole, [warning for warning in warnings if str(path) in warning]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return whole_checkpoints(root)


def _nothing_in(path: Path, warnings: list[str]) -> str:
    hint = warnings[-1] if warnings else "train first, or name another directory"
    return f"{path} holds no whole checkpoint; {hint}"


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
