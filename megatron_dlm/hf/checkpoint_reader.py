"""Rows of single tensors out of a checkpoint of any layout: no ranks, no model, bounded memory.

Megatron's checkpoints hold every weight as one global tensor, cut into the chunks that ranks had;
which chunk lies where is in `.metadata`. A chunk is read when one of its rows is asked for, and the
chunks of one tensor (one layer of a stacked one) are kept until another tensor is read.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_dlm.checkpoint.retention import Checkpoint, whole_checkpoints
from megatron_dlm.checkpoint.safe_loading import safe_loading
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.mapping import ExportedTensor, checkpoint_tensors


@dataclass(frozen=True)
class _Chunk:
    """A stored block of one global tensor."""

    file: str
    offset_bytes: int
    length_bytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of the checkpoint."""

    shape: tuple[int, ...]
    """With the axis of layers first where they are stacked."""
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class CheckpointReader:
    """Reads single tensors; `tensors` says what there is (optimizer state included)."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when `path` is no readable distributed checkpoint."""
        self.path = path
        self.tensors = _stored_tensors(path)
        self._open_tensor: tuple[str, int | None] | None = None
        self._chunks: dict[_Chunk, Tensor] = {}

    def rows(self, key: str, layer: int | None, start: int, num_rows: int) -> Tensor:
        """Rows [num_rows, ...] from `start` on of a tensor, or of one layer of a stacked one.

        Raises ValueError when they are missing or unreadable.
        """
        if (key, layer) != self._open_tensor:
            self._chunks.clear()
            self._open_tensor = (key, layer)
        stored = self.stored(key)
        shape = stored.shape if layer is None else stored.shape[1:]
        if start + num_rows > shape[0] or (layer is not None and layer >= stored.shape[0]):
            raise ValueError(f"{self.path}: {key} has shape {list(stored.shape)}, fewer rows asked")
        rows = torch.empty((num_rows, *shape[1:]), dtype=stored.dtype)
        num_found = 0
        for chunk in stored.chunks:
            if layer is not None and not _holds(chunk, 0, layer):
                continue
            offsets = chunk.offsets if layer is None else chunk.offsets[1:]
            sizes = chunk.sizes if layer is None else chunk.sizes[1:]
            first = max(start, offsets[0])
            last = min(start + num_rows, offsets[0] + sizes[0])
            if first >= last:
                continue
            block = self._chunk(key, chunk)
            block = block if layer is None else block[layer - chunk.offsets[0]]
            block = block[first - offsets[0] : last - offsets[0]]
            columns = tuple(
                slice(offset, offset + size)
                for offset, size in zip(offsets[1:], sizes[1:], strict=True)
            )
            place = (slice(first - start, last - start), *columns)
            rows[place] = block
            num_found += block.numel()
        if num_found != rows.numel():
            raise ValueError(f"{self.path}: chunks of {key} are missing or overlap")
        return rows

    def read(self, tensor: ExportedTensor) -> Tensor:
        """A tensor of Hugging Face's side, whole."""
        return torch.cat(
            [
                self.rows(source.key, source.layer, source.start, source.num_rows)
                for source in tensor.sources
            ]
        )

    def check(self, model: ModelConfig) -> None:
        """Refuse a checkpoint that lacks a weight of the model or has it in another shape."""
        num_layers = model.num_layers
        for tensor in checkpoint_tensors(model):
            stack = () if tensor.layer is None else (num_layers,)
            stored = self.stored(tensor.key)
            if stored.shape != (*stack, *tensor.shape):
                raise ValueError(
                    f"{self.path}: {tensor.key} has shape {list(stored.shape)}, its configuration "
                    f"implies {[*stack, *tensor.shape]}"
                )

    def stored(self, key: str) -> StoredTensor:
        """Shape, type and place of a tensor; ValueError when there is none of that name."""
        if key not in self.tensors:
            raise ValueError(f"{self.path} holds no tensor {key}")
        return self.tensors[key]

    def _chunk(self, key: str, chunk: _Chunk) -> Tensor:
        if chunk not in self._chunks:
            with (self.path / chunk.file).open("rb") as stream:
                view: Any = _Window(stream, chunk.offset_bytes, chunk.length_bytes)
                try:
                    loaded = torch.load(view, map_location="cpu", weights_only=True)
                except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                    reason = str(error).split("\n")[0]
                    raise ValueError(
                        f"{self.path / chunk.file}: {key} cannot be read ({reason})"
                    ) from error
            if not isinstance(loaded, Tensor) or tuple(loaded.shape) != chunk.sizes:
                raise ValueError(
                    f"{self.path / chunk.file}: {key} is not the tensor of shape "
                    f"{list(chunk.sizes)} that .metadata names"
                )
            self._chunks[chunk] = loaded
        return self._chunks[chunk]


class _Window(io.RawIOBase):
    """A stretch of an open file as a file of its own; chunks lie one behind the other."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._place = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + self._place)
        left = max(0, self._length - self._place)
        num_read = self._stream.readinto(memoryview(buffer).cast("B")[:left])  # type: ignore[attr-defined]
        self._place += num_read
        return num_read


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The newest whole checkpoint of a run directory, that of `step`, or a checkpoint directory.

    Raises ValueError when there is none.
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


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    _check_backend(path)
    try:
        with safe_loading():
            metadata = FileSystemReader(path).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}/.metadata cannot be read ({error})") from error
    places = metadata.storage_data
    tensors = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            place = places[MetadataIndex(key, chunk.offsets)]
            chunks.append(
                _Chunk(
                    place.relative_path,
                    place.offset,
                    place.length,
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                )
            )
        tensors[key] = StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))
    return tensors


def _check_backend(path: Path) -> None:
    file = path / "metadata.json"
    try:
        backend = json.loads(file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no distributed checkpoint: {file.name} ({error})") from None
    if backend != "torch_dist":
        raise ValueError(f"{file}: sharded_backend is {backend}; only torch_dist can be read")


def _holds(chunk: _Chunk, axis: int, index: int) -> bool:
    return chunk.offsets[axis] <= index < chunk.offsets[axis] + chunk.sizes[axis]
