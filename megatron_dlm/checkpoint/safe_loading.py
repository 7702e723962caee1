"""Nothing foreign is unpickled when a checkpoint is read.

PyTorch reads a distributed checkpoint's `.metadata` with a plain unpickler and its byte objects
with weights_only=False: a hostile file could run code. Inside `safe_loading` only the names that
such files really hold are accepted, and only files beside it. Remove it when PyTorch offers the
same.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from enum import EnumMeta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dlm.runtime.files import is_plain_name

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
_ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python 3.11.0 to 3.11.3 pickle members of enumerations with it
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"checkpoint metadata names {module}.{name}, refused")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Any:
    if not isinstance(kind, EnumMeta) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"checkpoint metadata asks for {kind}.{name}, refused")
    return kind[name]


def _load_metadata(file: Any) -> Metadata:
    try:
        metadata = _AllowListUnpickler(file).load()
        _refuse_other_directories(metadata)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__} {error}") from error
    return metadata


def _refuse_other_directories(metadata: Any) -> None:
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, no metadata")
    for place in (metadata.storage_data or {}).values():
        if not is_plain_name(place.relative_path):
            raise pickle.UnpicklingError(
                f"checkpoint metadata names the file {place.relative_path!r}, refused: it must lie "
                "beside it"
            )


def _load_weights_only(file: io.BytesIO, **options: Any) -> Any:
    return torch.load(file, **{**options, "weights_only": True})


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Replace the unsafe readers of torch.distributed.checkpoint for the time of one load."""
    safe_pickle = SimpleNamespace(load=_load_metadata, dump=pickle.dump)
    with (
        mock.patch.object(filesystem, "pickle", safe_pickle),
        mock.patch.object(default_planner, "torch", _TorchWithSafeLoad()),
        # Megatron Core asks for nothing, so that the default counts: no environment may loosen it.
        mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}),
    ):
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        yield


class _TorchWithSafeLoad:
    load = staticmethod(_load_weights_only)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
