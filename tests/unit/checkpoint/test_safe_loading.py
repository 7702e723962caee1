"""What the metadata of a checkpoint may name."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_dlm.checkpoint.safe_loading import safe_loading


class Asks:
    """Pickles as a call: the function and its arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def read(value: object) -> object:
    with safe_loading():
        return filesystem.pickle.load(io.BytesIO(pickle.dumps(value)))


def test_members_of_enumerations_as_every_python_writes_them() -> None:
    """Python 3.11.0 to 3.11.3 write getattr(WriteItemType, "TENSOR")."""
    assert read(WriteItemType.TENSOR) is WriteItemType.TENSOR
    assert read(Asks(getattr, WriteItemType, "TENSOR")) is WriteItemType.TENSOR


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
