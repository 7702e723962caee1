"""Sharded safetensors files written block by block, so that no tensor need be in memory whole.

The format (github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the
header with type, shape and place of every tensor, then their bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_sharded(
    directory: Path,
    entries: Sequence[Entry],
    blocks: Callable[[Entry], Iterable[Tensor]],
    *,
    max_shard_bytes: int,
) -> None:
    """Write all entries into one file, or into several and an index of them.

    `blocks` gives the rows of an entry in order, in tensors of its type. A shard holds at most
    `max_shard_bytes`, and at least one tensor.
    """
    shards = list(_shards(entries, max_shard_bytes))
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0], blocks)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, blocks)
        places.update({entry.name: name for entry in shard})
    total = sum(entry.num_bytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(entries: Sequence[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        if shard and num_bytes + entry.num_bytes > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(entry)
        num_bytes += entry.num_bytes
    yield shard


def _write_file(
    path: Path, entries: Sequence[Entry], blocks: Callable[[Entry], Iterable[Tensor]]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Wide types first: readers want an element to lie at a multiple of its size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            written = 0
            for block in blocks(entry):
                assert block.dtype == entry.dtype, f"{entry.name} is {block.dtype}"
                written += stream.write(_bytes(block))
            assert written == entry.num_bytes, f"{entry.name}: {written} bytes"
        stream.flush()
        os.fsync(stream.fileno())


def _bytes(block: Tensor) -> Any:
    return block.contiguous().view(torch.uint8).numpy().data
