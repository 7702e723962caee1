"""What the metadata of a checkpoint may name."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_dlm.checkpoint.safe_loading import _AllowListUnpickler, safe_loading


class Asks:
    """Pickles as a call: the function and its arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def read(value: object) -> object:
    with safe_loading():
        return filesystem.pickle.load(io.BytesIO(pickle.dumps(value)))


def unpickled(value: object) -> object:
    """What it is alone, before it is asked to be metadata."""
    return _AllowListUnpickler(io.BytesIO(pickle.dumps(value))).load()


def metadata(path: str) -> Metadata:
    """Of one tensor of two numbers in the file `path`."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    properties = TensorProperties(torch.float32)
    place = _StorageInfo(path, 0, 100)
    return Metadata(
        {"weight": TensorStorageMetadata(properties, torch.Size([2]), [chunk])},
        storage_data={MetadataIndex("weight", torch.Size([0])): place},
    )


def test_metadata_comes_through() -> None:
    assert read(metadata("__0_0.distcp")) == metadata("__0_0.distcp")


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_metadata_must_not_lead_elsewhere(path: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"names the file .*, refused"):
        read(metadata(path))


def test_flipped_bits_end_in_one_kind_of_error() -> None:
    content = pickle.dumps(metadata("__0_0.distcp"))
    draw = random.Random(5)
    num_refused = 0
    for place in draw.sample(range(8 * len(content)), 500):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        try:
            with safe_loading():
                filesystem.pickle.load(io.BytesIO(changed))
        except pickle.UnpicklingError:
            num_refused += 1
    assert num_refused > 100


def test_the_environment_cannot_loosen_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.load without arguments, as Megatron Core calls it for common.pt."""
    path = tmp_path / "common.pt"
    torch.save({"state": Asks(os.mkdir, str(tmp_path / "code_has_run"))}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with safe_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    assert not (tmp_path / "code_has_run").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_members_of_enumerations_as_every_python_writes_them() -> None:
    """Python 3.11.0 to 3.11.3 write getattr(WriteItemType, "TENSOR")."""
    assert unpickled(WriteItemType.TENSOR) is WriteItemType.TENSOR
    assert unpickled(Asks(getattr, WriteItemType, "TENSOR")) is WriteItemType.TENSOR


@pytest.mark.parametrize(
    "hostile",
    [
        Asks(os.system, "true"),
        Asks(getattr, WriteItemType, "__subclasses__"),
        Asks(getattr, "text", "upper"),
        Asks(getattr, dict, "fromkeys"),
    ],
    ids=["a call", "no member", "of a value", "of another class"],
)
def test_nothing_else_comes_through(hostile: Asks) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        read(hostile)
