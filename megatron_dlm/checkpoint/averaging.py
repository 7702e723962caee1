"""`megatron-dlm checkpoint average`: the weights of several checkpoints, averaged in fp32.

One matrix at a time is in memory, once for each checkpoint that is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.retention import Checkpoint, whole_checkpoints
from megatron_dlm.checkpoint.tensor_reader import TensorReader, is_weight
from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.checkpoint_commands import CheckpointAverageConfig

# Where Megatron's distributed optimizer keeps the fp32 weights that it updates.
_FP32_PREFIX = "optimizer.state.param."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Piece:
    """What is read and written at once: a tensor, or one place of a stack of matrices."""

    key: str
    layer: int | None
    shape: tuple[int, ...]


def average(config: CheckpointAverageConfig) -> None:
    """Write the averaged checkpoint; prints what to type next."""
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir {output} holds other files; name a new directory")
    checkpoints = _chosen(config)
    newest = checkpoints[-1]
    readers = [TensorReader(checkpoint.path) for checkpoint in checkpoints]
    _refuse_different(checkpoints, readers)
    factors = coefficients(len(checkpoints), config.decay if config.kind == "ema" else None)
    pieces = _pieces(readers[-1])
    types = {key: tensor.dtype for key, tensor in readers[-1].tensors.items() if is_weight(key)}
    if config.dtype != "same":
        types = dict.fromkeys(types, _DTYPES[config.dtype])
    averaged = {
        "from": str(newest.path.parent),
        "steps": [checkpoint.step for checkpoint in checkpoints],
        "coefficients": factors,
    }
    kept = {name: newest.manifest[name] for name in ("model", "config", "num_parameters")}
    with Progress() as progress:
        bar = progress.add_task("averaging", total=len(pieces))
        path = write_checkpoint(
            output / "checkpoints",
            pieces,
            _reading(readers, factors, types, lambda: progress.advance(bar)),
            dtype=types,
            description={**kept, "data": {"digest": None}, "averaged": averaged},
        )
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    print(f"averaged the weights of steps {steps} ({config.kind}): {path}")
    print(
        f"train from it: megatron-dlm train --config {Path(config.run) / 'config.yaml'} "
        f"--train.output_dir {output}"
    )


def coefficients(count: int, decay: float | None) -> list[float]:
    """Weight of each checkpoint, oldest first; they sum to 1. Without decay all are alike."""
    if decay is None:
        return [1 / count] * count
    first = decay ** (count - 1)
    return [first, *((1 - decay) * decay ** (count - 1 - place) for place in range(1, count))]


def _chosen(config: CheckpointAverageConfig) -> list[Checkpoint]:
    """Oldest first, every checksum compared."""
    run = Path(config.run)
    steps = sorted(set(config.steps))
    if config.last is not None:
        whole, _ = whole_checkpoints(find_checkpoint(run, verify=False).path.parent)
        steps = [checkpoint.step for checkpoint in whole][-config.last :]
        if len(steps) < config.last:
            raise ValueError(f"{run} holds whole checkpoints of steps {steps} only; lower last")
    return [find_checkpoint(run, step) for step in steps]


def _refuse_different(checkpoints: Sequence[Checkpoint], readers: Sequence[TensorReader]) -> None:
    newest, shapes = checkpoints[-1], _weight_shapes(readers[-1])
    for checkpoint, reader in zip(checkpoints, readers, strict=True):
        is_same = checkpoint.manifest["model"] == newest.manifest["model"]
        if not is_same or _weight_shapes(reader) != shapes:
            raise ValueError(
                f"{checkpoint.path} holds another model than {newest.path}; average checkpoints of "
                "one model"
            )


def _weight_shapes(reader: TensorReader) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in reader.tensors.items() if is_weight(key)}


def _pieces(reader: TensorReader) -> list[_Piece]:
    pieces = []
    for key, shape in _weight_shapes(reader).items():
        if len(shape) > 2:
            pieces += [_Piece(key, layer, shape[1:]) for layer in range(shape[0])]
        else:
            pieces.append(_Piece(key, None, shape))
    return pieces


def _reading(
    readers: Sequence[TensorReader],
    factors: Sequence[float],
    types: dict[str, torch.dtype],
    advance: Callable[[], None],
) -> Callable[[_Piece], Tensor]:
    def read(piece: _Piece) -> Tensor:
        total = torch.zeros(piece.shape, dtype=torch.float32)
        for factor, reader in zip(factors, readers, strict=True):
            rows = reader.rows(_most_precise(reader, piece.key), piece.layer, 0, piece.shape[0])
            total.add_(rows, alpha=factor)
        advance()
        return total.to(types[piece.key])

    return read


def _most_precise(reader: TensorReader, key: str) -> str:
    """Where the fp32 values of a weight are; its own name where only they are stored."""
    other = reader.tensors.get(_FP32_PREFIX + key)
    is_same = other is not None and other.shape == reader.stored(key).shape
    return _FP32_PREFIX + key if is_same else key
