"""Checkpoints of a few tensors, written without ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.schema import RunConfig


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, or one place of a stack."""

    key: str
    layer: int | None
    shape: tuple[int, ...]


def random_weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A table, a vector, a stack of vectors and a stack of matrices."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"table": (10, 4), "scale": (6,), "norms": (2, 5), "stack": (3, 4, 5)}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write_step(
    run: Path, step: int, tensors: Mapping[str, Tensor], **model: int
) -> retention.Checkpoint:
    """`run`/checkpoints/iter_N with these tensors; those of 3 dimensions are stacked."""
    pieces = []
    for key, tensor in tensors.items():
        if tensor.dim() > 2:
            pieces += [Stored(key, layer, tuple(tensor.shape[1:])) for layer in range(len(tensor))]
        else:
            pieces.append(Stored(key, None, tuple(tensor.shape)))
    settings = {"vocab_size": 10, **model}
    config = RunConfig(model=ModelConfig(**settings))
    root = run / "checkpoints"
    path = write_checkpoint(
        root,
        pieces,
        lambda piece: (
            tensors[piece.key] if piece.layer is None else tensors[piece.key][piece.layer]
        ),
        dtype={key: tensor.dtype for key, tensor in tensors.items()},
        description={
            "model": asdict(config)["model"],
            "data": {"digest": None},
            "config": asdict(config),
            "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        },
    )
    target = root / retention.directory_name(step)
    if step:
        path.rename(target)
        (root / retention.LATEST_NAME).write_text(f"{step}\n")
    whole, _ = retention.whole_checkpoints(root)
    return next(checkpoint for checkpoint in whole if checkpoint.path == target)
