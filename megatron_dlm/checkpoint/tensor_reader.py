"""Rows of single tensors out of a checkpoint of any layout: no ranks, no model, bounded memory.

Megatron's checkpoints hold every weight as one global tensor, cut into the chunks that ranks had;
which chunk lies where is in `.metadata`. A chunk is read when one of its rows is asked for, and the
chunks of one tensor (one layer of a stacked one) are kept until another tensor is read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_dlm.checkpoint.safe_loading import safe_loading
from megatron_dlm.config.json_text import parse_json


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


class TensorReader:
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
                except Exception as error:  # damaged bytes make it fail in any way
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


def is_weight(key: str) -> bool:
    """Whether a tensor of the checkpoint is a weight of the model, not state of the optimizer."""
    return not key.startswith("optimizer.")


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


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    _check_backend(path)
    metadata = _read_metadata(path)
    try:
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        return {
            key: _stored_tensor(key, entry, metadata.storage_data, sizes)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # forged or damaged
        raise ValueError(f"{path}/.metadata contradicts itself ({error})") from error


def stored_names(path: Path) -> set[str]:
    """Names of all tensors and objects of a checkpoint; ValueError where they cannot be read."""
    # The pieces of an object are stored as NAME/shard_I_N.
    return {key.partition("/")[0] for key in _read_metadata(path).state_dict_metadata}


def _read_metadata(path: Path) -> Metadata:
    try:
        with safe_loading():
            return FileSystemReader(path).read_metadata()
    except (OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}/.metadata cannot be read ({error})") from error


def _stored_tensor(
    key: str, entry: TensorStorageMetadata, places: Any, file_bytes: dict[str, int]
) -> StoredTensor:
    """Raises ValueError where more is announced than the files can hold."""
    dtype = entry.properties.dtype
    chunks = []
    for chunk in entry.chunks:
        place = places[MetadataIndex(key, chunk.offsets)]
        offsets, shape = tuple(chunk.offsets), tuple(chunk.sizes)
        stored = _Chunk(place.relative_path, place.offset, place.length, offsets, shape)
        ends = [offset + side for offset, side in zip(offsets, shape, strict=True)]
        is_inside = all(map(int.__le__, ends, entry.size)) and min((*offsets, *shape)) >= 0
        is_held = math.prod(shape) * dtype.itemsize <= place.length
        is_in_file = place.offset + place.length <= file_bytes.get(place.relative_path, 0)
        if not (is_inside and is_held and is_in_file and place.offset >= 0):
            raise ValueError(f"{key}: a chunk of shape {list(shape)} in {place.relative_path}")
        chunks.append(stored)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(entry.size):
        raise ValueError(f"{key}: its chunks do not make up {list(entry.size)}")
    return StoredTensor(tuple(entry.size), dtype, tuple(chunks))


def _check_backend(path: Path) -> None:
    file = path / "metadata.json"
    try:
        backend = parse_json(file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no distributed checkpoint: {file.name} ({error})") from None
    if backend != "torch_dist":
        raise ValueError(f"{file}: sharded_backend is {backend}; only torch_dist can be read")


def _holds(chunk: _Chunk, axis: int, index: int) -> bool:
    return chunk.offsets[axis] <= index < chunk.offsets[axis] + chunk.sizes[axis]
