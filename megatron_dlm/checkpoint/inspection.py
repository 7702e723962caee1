"""`megatron-dlm checkpoint inspect` and `verify`: what checkpoints hold, and if it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megatron_dlm.checkpoint.damage import damage
from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.retention import Checkpoint, whole_checkpoints
from megatron_dlm.checkpoint.tensor_reader import TensorReader, is_weight
from megatron_dlm.config.checkpoint_commands import CheckpointInspectConfig, CheckpointVerifyConfig
from megatron_dlm.data.commands.report_file import in_bytes, prepare_report, write_report


def inspect(config: CheckpointInspectConfig) -> None:
    """Print the checkpoint's facts and its tensors."""
    prepare_report(config.output)
    checkpoint = find_checkpoint(Path(config.checkpoint), config.step, verify=False)
    found = _describe(checkpoint)
    console = Console()
    _print_facts(console, found, config.optimizer)
    write_report(config.output, found)


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that the command knows of a checkpoint, ready for JSON."""
    manifest = checkpoint.manifest
    tensors = [
        {
            "name": key,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": math.prod(tensor.shape) * tensor.dtype.itemsize,
            "is_weight": is_weight(key),
        }
        for key, tensor in TensorReader(checkpoint.path).tensors.items()
    ]
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "format": manifest.get("format"),
        "world_size": manifest.get("world_size"),
        "num_parameters": manifest["num_parameters"],
        "tensors": tensors,
        "file_bytes": manifest["file_bytes"],
        "config": manifest["config"],
        **{name: manifest[name] for name in ("averaged", "imported_from") if name in manifest},
    }


def _print_facts(console: Console, found: dict[str, Any], with_optimizer: bool) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    model, objective = found["config"]["model"], found["config"]["objective"]
    size = in_bytes(sum(found["file_bytes"].values()))
    ranks = f", written by {found['world_size']} ranks" if found["world_size"] else ""
    line(
        f"{found['path']}: step {found['step']}, {size} in {len(found['file_bytes'])} files{ranks}"
    )
    line(
        f"{found['num_parameters']:,} parameters: {model['num_layers']} layers, hidden size "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']}; objective {objective['kind']}"
    )
    if "averaged" in found:
        line(f"averaged from steps {found['averaged']['steps']} of {found['averaged']['from']}")
    rest = [tensor for tensor in found["tensors"] if not tensor["is_weight"]]
    shown = [tensor for tensor in found["tensors"] if with_optimizer or tensor["is_weight"]]
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "size")
    for tensor in shown:
        shape = " x ".join(str(side) for side in tensor["shape"])
        table.add_row(tensor["name"], shape, tensor["dtype"], in_bytes(tensor["bytes"]))
    console.print(table)
    total = in_bytes(sum(tensor["bytes"] for tensor in rest))
    line(f"optimizer: {len(rest)} tensors, {total}" if rest else "weights only, no optimizer")


def verify(config: CheckpointVerifyConfig) -> None:
    """Print a verdict on every checkpoint; ValueError if one is damaged."""
    console = Console()
    num_found, bad = 0, []
    for name in config.checkpoint:
        for path, problems, note in _verdicts(Path(name)):
            num_found += 1
            text = "; ".join(problems) if problems else note
            style = "red" if problems else None
            console.print(f"{path}: {text}", style=style, markup=False, soft_wrap=True)
            bad += [f"{path}: {text}"] if problems else []
    if bad:
        raise ValueError(f"{len(bad)} of {num_found} checkpoints are damaged; the first: {bad[0]}")


def _verdicts(path: Path) -> Iterable[tuple[str, list[str], str]]:
    """(path, problems, what was found good) of a checkpoint, or of all of a run."""
    is_single = path.name.startswith("iter_")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    whole, warnings = whole_checkpoints(path.parent if is_single else root)
    if is_single:
        whole = [checkpoint for checkpoint in whole if checkpoint.path == path]
        warnings = [warning for warning in warnings if warning.startswith(f"ignoring {path}: ")]
    if not whole and not warnings:
        raise ValueError(f"{path} holds no checkpoint; name a run directory or a checkpoint")
    for warning in warnings:
        place, _, problem = warning.removeprefix("ignoring ").partition(": ")
        yield place, [problem], ""
    for checkpoint in whole:
        names = sorted(checkpoint.checksums)
        size = in_bytes(sum(checkpoint.manifest["file_bytes"].values()))
        note = f"whole, {size} compared" if names else f"sizes are right, {size} have no checksums"
        yield str(checkpoint.path), damage(checkpoint, names), note
