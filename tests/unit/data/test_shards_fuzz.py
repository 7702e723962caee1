"""Damaged .idx and .bin bytes: a clear refusal, or exactly what the files say, never a crash."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import random_documents, write_megatron_shard, write_shard

from megatron_dlm.data.commands.shard_check import ShardTask, check_index, check_shard
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.storage.document_blocks import read_blocks
from megatron_dlm.data.storage.shards import Shard
from megatron_dlm.runtime.errors import is_users

SENTENCES = [[[3, 4, 1]], [[5, 6], [7, 1]], [], [[8], [], [9, 10, 1]], [[11, 12, 13, 1]]]
ours = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


Damage = tuple[str, list[tuple[float, bytes]], int]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """A file, what to write over it (place as a share of the file), and bytes to cut or append."""
    suffix = draw(st.sampled_from([".idx", ".idx", ".bin"]))
    # Numbers of the size of real ones are the ones that could be taken for them.
    near = st.integers(-3, 40)
    number = st.one_of(near, st.integers(-(2**31), 2**31 - 1))
    kinds = [number.map(lambda n: struct.pack("<i", n)), near.map(lambda n: struct.pack("<q", n))]
    kinds.append(st.binary(min_size=1, max_size=2))
    change = st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(kinds))
    changes = draw(st.lists(change, max_size=2))
    return suffix, changes, draw(st.sampled_from([0, 0, 0, 0, 0, -1, -8, -40, 1, 8]))


def damaged_copy(source: str, target: Path, damage: Damage) -> bool:
    """Copy a shard, damaged; returns whether any byte differs."""
    for suffix in (".idx", ".bin", ".manifest.json"):
        if Path(source + suffix).exists():
            shutil.copy(source + suffix, f"{target}{suffix}")
    suffix, changes, growth = damage
    path = Path(f"{target}{suffix}")
    before = path.read_bytes()
    data = bytearray(before)
    for share, written in changes:
        # The fields of an index are whole words after its header.
        place = 34 + int(share * (len(data) - 34)) // 4 * 4 if suffix == ".idx" else 0
        place = int(share * len(data)) if len(written) < 4 else place
        data[place : place + len(written)] = written
    data = data[: len(data) + growth] if growth < 0 else data + bytes(growth)
    path.write_bytes(bytes(data))
    return bytes(data) != before


def read_all(prefix: Path) -> None:
    """Every way to read; whatever is read lies back to back in the file."""
    shard = Shard(prefix)
    stored = np.fromfile(f"{prefix}.bin", dtype=shard.dtype)
    blocks = [block.tokens for block in read_blocks(shard, block_tokens=4)]
    read = np.concatenate([np.zeros(0, dtype=shard.dtype), *blocks])
    np.testing.assert_array_equal(read, stored)
    documents = [shard.document(number) for number in range(shard.num_documents)]
    together = np.concatenate([np.zeros(0, dtype=shard.dtype), *documents])
    np.testing.assert_array_equal(together, stored)
    for token in range(shard.num_tokens):
        start, length = shard.document_spans(np.array([shard.document_at(token)]))
        assert start <= token < start + length
    check_index(shard)
    np.testing.assert_array_equal(
        shard.sequence_pointers,
        np.cumsum([0, *shard.sequence_lengths[:-1]])[: len(shard.sequence_lengths)]
        * shard.dtype.itemsize,
    )


def refusal(action: Callable[[], object]) -> str | None:
    """The one line of our own that refuses it; None if it works. Anything else is a crash."""
    try:
        action()
    except ValueError as error:
        message = str(error)
        return message if is_users(error) and "\n" not in message else f"a crash: {message}"
    return None


@pytest.fixture(scope="module")
def megatrons(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_megatron_shard(tmp_path_factory.mktemp("theirs") / "shard", SENTENCES)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard(tmp_path_factory.mktemp("mine") / "shard", random_documents(6))


@ours
@given(damage=damages())
def test_shard_without_manifest(damage, megatrons: str, tmp_path: Path) -> None:
    damaged_copy(megatrons, tmp_path / "shard", damage)
    message = refusal(lambda: read_all(tmp_path / "shard"))
    assert message is None or str(tmp_path / "shard") in message


@ours
@given(damage=damages())
def test_shard_with_manifest(damage, mine: str, tmp_path: Path) -> None:
    is_damaged = damaged_copy(mine, tmp_path / "shard", damage)
    verdict = check_shard(ShardTask(str(tmp_path / "shard")), lambda size_bytes: None)
    assert (verdict.problem is not None) == is_damaged
    if verdict.problem:
        assert str(tmp_path / "shard") in verdict.problem


@ours
@given(text=st.one_of(st.text(max_size=30), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format", "shards", "facts", "tokens", "documents", "prefix", "x"]),
        inner, max_size=7,
    ),
    max_leaves=12,
)))  # fmt: skip
def test_list_of_shards(text, tmp_path: Path) -> None:
    content = text if isinstance(text, str) else json.dumps(text)
    (tmp_path / "text.dataset.json").write_text(content, encoding="utf-8")
    message = refusal(lambda: open_dataset(tmp_path / "text"))
    assert message is None or "text.dataset.json is not a list of shards" in message
