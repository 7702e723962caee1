"""A stream is whole documents in a seeded order, cut to the budget, and budgets are nested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.corpus import TokenStream
from megatron_dlm.data.order import permute
from megatron_dlm.data.shards import Shard, ShardWriter


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """300 documents of 0 to 12 tokens; every token id is unique."""
    prefix = tmp_path_factory.mktemp("shard") / "unique"
    lengths = np.random.default_rng(0).integers(0, 13, 300)
    with ShardWriter(prefix, vocab_size=5000) as writer:
        writer.add_documents(np.arange(lengths.sum()), lengths.tolist())
        writer.publish()
    return Shard(prefix)


def reference(shard: Shard, key: int) -> np.ndarray:
    order = permute(np.arange(shard.num_documents), size=shard.num_documents, key=key)
    return np.concatenate([shard.document(int(number)) for number in order]).astype(np.int64)


@pytest.mark.parametrize("key", [0, 99])
def test_all_documents_in_permuted_order(shard: Shard, key: int) -> None:
    stream = TokenStream(shard, num_tokens=shard.num_tokens, key=key)
    expected = reference(shard, key)
    assert np.array_equal(stream.read(0, shard.num_tokens), expected)
    assert not np.array_equal(expected, np.arange(shard.num_tokens))
    generator = np.random.default_rng(1)
    for start in generator.integers(0, shard.num_tokens, 200):
        length = int(generator.integers(0, min(60, shard.num_tokens - start) + 1))
        found = stream.read(int(start), length)
        assert found.dtype == np.int64
        assert np.array_equal(found, expected[start : start + length])


@pytest.mark.parametrize("num_tokens", [1, 5, 100, 777, 1500])
def test_a_budget_is_a_prefix_of_every_larger_one(shard: Shard, num_tokens: int) -> None:
    stream = TokenStream(shard, num_tokens=num_tokens, key=3)
    assert np.array_equal(stream.read(0, num_tokens), reference(shard, 3)[:num_tokens])
    with pytest.raises(AssertionError):
        stream.read(num_tokens - 1, 2)


def test_memory_is_a_fraction_of_the_documents(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "many", vocab_size=100) as writer:
        writer.add_documents(np.ones(200_000, dtype=np.int64), [1] * 200_000)
        writer.publish()
    stream = TokenStream(Shard(tmp_path / "many"), num_tokens=150_000, key=1)
    assert stream._block_starts.nbytes <= 150_000 / 4 + 8
    assert stream.read(149_990, 10).tolist() == [1] * 10
