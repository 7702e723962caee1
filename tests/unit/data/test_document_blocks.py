"""Blocks tile a shard; digests are those of the documented rule."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import EOD, write_megatron_shard, write_shard

from megatron_dlm.data.storage import document_blocks
from megatron_dlm.data.storage.document_blocks import document_digests, read_blocks, read_starts
from megatron_dlm.data.storage.shards import Shard

DOCUMENTS = [[5, 6, EOD], [], [7] * 9, [EOD], [8, EOD, EOD], [9]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(3, 99), max_size=9), max_size=12),
    block_tokens=st.integers(1, 30),
    index_documents=st.integers(1, 5),
)
def test_blocks_tile_the_shard(
    documents: list[list[int]], block_tokens: int, index_documents: int, tmp_path: Path
) -> None:
    shard = Shard(write_shard(tmp_path / "shard", documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_blocks, "_INDEX_DOCUMENTS", index_documents)
        found, start = [], 0
        for block in read_blocks(shard, block_tokens=block_tokens):
            assert (block.first, block.start) == (len(found), start)
            assert block.num_documents == 1 or len(block.tokens) <= block_tokens
            found += [ids.tolist() for ids in np.split(block.tokens, block.bounds[1:-1])]
            start += len(block.tokens)
        assert found == documents
        lengths = [n for _, starts in read_starts(shard) for n in np.diff(starts).tolist()]
        assert lengths == [len(document) for document in documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_digests(tmp_path: Path, dtype: type[np.generic]) -> None:
    prefix = write_megatron_shard(tmp_path / "shard", [[ids] for ids in DOCUMENTS], dtype)
    texts = [[5, 6], [], [7] * 9, [], [8, EOD], [9]]  # one final EOD does not count
    (block,) = read_blocks(Shard(prefix))
    expected = [
        hashlib.blake2b(b"".join(n.to_bytes(4, "little") for n in text), digest_size=8).digest()
        for text in texts
    ]
    digests = document_digests(block, EOD)
    assert [int(n).to_bytes(8, "little") for n in digests] == expected
    assert document_digests(block, None)[0] != digests[0]
    assert document_digests(block, None)[2] == digests[2]


def test_file_that_shrinks_is_named(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "shard", DOCUMENTS)
    shard = Shard(prefix)
    (tmp_path / "shard.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"shard\.bin was cut while it was read"):
        list(read_blocks(shard))
