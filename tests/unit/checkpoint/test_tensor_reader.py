"""Reading tensors of a checkpoint whose files were changed by somebody who also forged the sums."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import random_weights, write_step
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dlm.checkpoint.tensor_reader import TensorReader


def read_all(path: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(path)
    return {
        key: reader.rows(key, None, 0, stored.shape[0]) for key, stored in reader.tensors.items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_step(tmp_path, 1, random_weights(0)).path


def test_whole_tensors_come_back(path: Path) -> None:
    found = read_all(path)
    expected = random_weights(0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json"])
def test_flipped_bits_are_values_or_one_line(name: str, path: Path) -> None:
    """Never another kind of error, never an allocation larger than the files."""
    file = path / name
    content = file.read_bytes()
    draw = random.Random(f"reading {name}")
    messages = []
    for place in draw.sample(range(8 * len(content)), 100):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            found = read_all(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert all(values.nbytes < 1000 for values in found.values())
    assert len(messages) > 10
    assert [message for message in messages if str(path) not in message] == []


def edit(path: Path, change: Any) -> None:
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def huge(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["scale"]
    entry.size = torch.Size([10**13])
    entry.chunks[0].sizes = torch.Size([10**13])


def overlapping(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["scale"]
    entry.chunks.append(entry.chunks[0])


def behind_the_end(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.offset += 10**6


@pytest.mark.parametrize("change", [huge, overlapping, behind_the_end])
def test_announcements_that_cannot_be_true(change: Any, path: Path) -> None:
    edit(path, change)
    with pytest.raises(ValueError, match=r"\.metadata contradicts itself \(\S+: "):
        TensorReader(path)
