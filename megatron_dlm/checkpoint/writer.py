"""Writes weights as a checkpoint that training starts from on any layout; one tensor at a time.

It has the same format as those of training, but holds no optimizer state, no counters and step 0.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_dlm.checkpoint import retention

# What Megatron Core asks a directory before it reads it.
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class WeightTensor(Protocol):
    """A tensor to write, or one layer of a stacked one."""

    @property
    def key(self) -> str:
        """Its name in the checkpoint, the same for all layers of a stack."""

    @property
    def layer(self) -> int | None:
        """Place in the stack, from 0 without gaps; None where nothing is stacked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the axis of the stack."""


W = TypeVar("W", bound=WeightTensor)


def write_checkpoint(
    root: Path,
    tensors: Sequence[W],
    read: Callable[[W], Tensor],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    description: Mapping[str, Any],
) -> Path:
    """Write `root`/iter_0000000 whole or not at all; returns its path.

    `read` gives a tensor in `dtype` (one for all, or key -> dtype); stacked ones are asked for
    layer by layer. `description` goes into the manifest.
    """
    unfinished = root / f"{retention.directory_name(0)}{retention.UNFINISHED_SUFFIX}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_tensors(unfinished, tensors, read, dtype)
    torch.save({}, unfinished / "common.pt")
    (unfinished / "metadata.json").write_text(json.dumps(_BACKEND))
    manifest = {"step": 0, retention.WEIGHTS_ONLY: True, **description}
    retention.write_manifest(unfinished, manifest)
    return retention.publish(unfinished, step=0)


def _write_tensors(
    directory: Path,
    tensors: Sequence[W],
    read: Callable[[W], Tensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
) -> None:
    num_layers = Counter(tensor.key for tensor in tensors)
    sources: dict[MetadataIndex, W] = {}
    items = []
    stored: dict[str, TensorStorageMetadata] = {}
    for tensor in tensors:
        chunk = _chunk(tensor)
        stack = () if tensor.layer is None else (num_layers[tensor.key],)
        size = torch.Size((*stack, *tensor.shape))
        properties = TensorProperties(
            dtype=dtype if isinstance(dtype, torch.dtype) else dtype[tensor.key]
        )
        entry = stored.setdefault(tensor.key, TensorStorageMetadata(properties, size, []))
        entry.chunks.append(chunk)
        index = MetadataIndex(tensor.key, chunk.offsets)
        sources[index] = tensor
        data = TensorWriteData(chunk, properties, size)
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    writer = _Writer(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    planner = _Planner(lambda index: _as_chunk(read(sources[index]), sources[index]))
    results = writer.write_data(plan, planner).wait()
    writer.finish(Metadata(dict(stored)), [results])


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """It would be the directory as a Path object, which safe loading does not unpickle."""


class _Planner(SavePlanner):
    """Gives the writer its tensors, each when it is written."""

    def __init__(self, resolve: Callable[[MetadataIndex], Tensor]) -> None:
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._resolve(write_item.index)

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the plan is made by write_checkpoint")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


def _chunk(tensor: WeightTensor) -> ChunkStorageMetadata:
    shape = tensor.shape if tensor.layer is None else (1, *tensor.shape)
    offsets = (0,) * len(shape) if tensor.layer is None else (tensor.layer, *[0] * (len(shape) - 1))
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))


def _as_chunk(values: Tensor, tensor: WeightTensor) -> Tensor:
    assert tuple(values.shape) == tensor.shape, f"{tensor.key}: {list(values.shape)}"
    return values if tensor.layer is None else values.unsqueeze(0)
