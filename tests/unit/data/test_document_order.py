"""Orders of documents: whole documents once each, budgets nested, blocks found again anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from unique_shards import VOCAB_SIZE, documents, write_unique

from megatron_dlm.data.document_order import (
    GROUP_DOCUMENTS,
    Block,
    BudgetOrder,
    DocumentOrder,
    WholeOrder,
)
from megatron_dlm.data.order import permute
from megatron_dlm.data.storage.dataset import Dataset, open_dataset
from megatron_dlm.data.token_stream import TokenReader, TokenStream

LENGTHS = np.random.default_rng(0).integers(0, 13, 300).tolist()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """300 documents of 0 to 12 tokens in 7 shards."""
    return write_unique(tmp_path_factory.mktemp("shards") / "text", LENGTHS, num_shards=7)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """8000 documents of 0 to 9 tokens in 3 shards, several groups in each."""
    lengths = np.random.default_rng(1).integers(0, 10, 8000).tolist()
    return write_unique(tmp_path_factory.mktemp("large") / "text", lengths, num_shards=3)


def read_all(order: DocumentOrder, start: int = 0, length: int | None = None) -> np.ndarray:
    reader = TokenReader(order.dataset, vocab_size=VOCAB_SIZE, mask_token_id=None)
    length = order.num_tokens if length is None else length
    return TokenStream(order, reader).read(start, length)[0]


def budget_reference(key: int, lengths: list[int] = LENGTHS) -> np.ndarray:
    texts = documents(lengths)
    order = permute(np.arange(len(texts)), size=len(texts), key=key)
    return np.concatenate([texts[number] for number in order])


@pytest.mark.parametrize("key", [0, 99])
def test_a_budget_takes_documents_in_permuted_order(dataset: Dataset, key: int) -> None:
    order = BudgetOrder(dataset, num_tokens=dataset.num_tokens, key=key)
    expected = budget_reference(key)
    assert np.array_equal(read_all(order), expected)
    assert not np.array_equal(expected, np.sort(expected))


@pytest.mark.parametrize("num_tokens", [1, 5, 100, 777, 1500])
def test_a_budget_is_a_prefix_of_every_larger_one(dataset: Dataset, num_tokens: int) -> None:
    order = BudgetOrder(dataset, num_tokens=num_tokens, key=3)
    assert np.array_equal(read_all(order), budget_reference(3)[:num_tokens])
    with pytest.raises(AssertionError):
        read_all(order, num_tokens - 1, 2)


@pytest.mark.parametrize("block_documents", [1, 32, 64])
def test_blocks_one_by_one_and_in_a_scan_are_the_same(
    dataset: Dataset, block_documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dlm.data.document_order._SCAN_DOCUMENTS", 70)
    order = BudgetOrder(dataset, num_tokens=1000, key=5, block_documents=block_documents)
    scanned = list(order.blocks())
    assert len(scanned) == order.num_blocks > 2
    for number, block in enumerate(scanned):
        assert_same(block, order.block(number))
    assert [block.bounds[0] for block in scanned[1:]] == [b.bounds[-1] for b in scanned[:-1]]
    assert (scanned[0].bounds[0], scanned[-1].bounds[-1]) == (0, 1000)


def assert_same(one: Block, other: Block) -> None:
    for name in ("shards", "starts", "bounds"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_a_budget_does_not_depend_on_how_the_text_is_sharded(
    tmp_path: Path, num_shards: int
) -> None:
    dataset = write_unique(tmp_path / "text", LENGTHS, num_shards=num_shards)
    order = BudgetOrder(dataset, num_tokens=900, key=3)
    assert np.array_equal(read_all(order), budget_reference(3)[:900])


def test_the_whole_is_mixed_within_groups_of_neighbours(large: Dataset) -> None:
    order = WholeOrder(large, key=4)
    tokens = read_all(order)
    assert np.array_equal(np.sort(tokens), np.arange(large.num_tokens) + 10)
    end = 0
    for place, entry in enumerate(large.entries):
        shard = large.shard(place)
        for first in range(0, entry.documents, GROUP_DOCUMENTS):
            last = min(first + GROUP_DOCUMENTS, entry.documents)
            start, end = end, end + int(np.diff(shard.document_starts(np.array([first, last])))[0])
            group = tokens[start:end]
            assert np.array_equal(np.sort(group), np.arange(start, end) + 10)
            assert (np.diff(group) != 1).mean() > 0.1  # documents of 4.5 tokens, not in file order
    assert not np.array_equal(tokens, read_all(WholeOrder(large, key=5)))


@pytest.mark.parametrize("kind", ["whole", "budget"])
def test_any_stretch_is_found_at_once(large: Dataset, kind: str) -> None:
    order: DocumentOrder = WholeOrder(large, key=4)
    if kind == "budget":
        order = BudgetOrder(large, num_tokens=20_000, key=4)
    tokens = read_all(order)
    generator = np.random.default_rng(1)
    for start in generator.integers(0, order.num_tokens, 200):
        length = int(generator.integers(1, min(3000, order.num_tokens - start) + 1))
        found = read_all(order, int(start), length)
        assert found.dtype == np.int64
        assert np.array_equal(found, tokens[start : start + length])


def test_each_group_is_mixed_on_its_own(tmp_path: Path) -> None:
    """Equal groups in different order: each has its own key."""
    lengths = [1] * (4 * GROUP_DOCUMENTS)
    order = WholeOrder(write_unique(tmp_path / "text", lengths, num_shards=2), key=1)
    groups = [read_all(order, n * GROUP_DOCUMENTS, GROUP_DOCUMENTS) for n in range(4)]
    orders = {tuple((group - group.min()).tolist()) for group in groups}
    assert len(orders) == 4


def test_a_small_dataset_is_ordered_as_its_whole_budget(tmp_path: Path) -> None:
    dataset = write_unique(tmp_path / "text", LENGTHS)
    assert np.array_equal(read_all(WholeOrder(dataset, key=3)), budget_reference(3))


def test_the_whole_touches_no_shard_before_it_is_read(large: Dataset) -> None:
    dataset = open_dataset(large.prefix)
    order = WholeOrder(dataset, key=1)
    order.prepare()
    assert order.num_blocks == 3 * 3
    assert dataset._shards == {}
    last = dataset.num_tokens - 1
    assert order.block(order.block_at(last)).bounds[-1] == dataset.num_tokens
    assert list(dataset._shards) == [2]


def test_a_budget_keeps_a_quarter_byte_for_a_document(tmp_path: Path) -> None:
    dataset = write_unique(tmp_path / "many", [1] * 50_000)
    order = BudgetOrder(dataset, num_tokens=40_000, key=1)
    assert order._block_starts.nbytes <= 40_000 / 4 + 8
    assert len(set(read_all(order).tolist())) == 40_000


def test_single_look_ups_give_what_arrays_give(large: Dataset) -> None:
    for place, entry in enumerate(large.entries):
        shard = large.shard(place)
        starts, lengths = shard.document_spans(np.arange(entry.documents))
        for number in (0, 1, entry.documents // 2, entry.documents - 1):
            assert shard.document_span(number) == (starts[number], lengths[number])


@pytest.mark.parametrize("field", ["pointer", "bound"])
def test_a_damaged_index_is_named_by_both_kinds_of_look_up(tmp_path: Path, field: str) -> None:
    write_unique(tmp_path / "text", [5] * 100)
    path = tmp_path / "text.idx"
    content = bytearray(path.read_bytes())
    place = 34 + 4 * 100 + 8 * 50 + (8 * 100 if field == "bound" else 0)
    content[place : place + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    shard = open_dataset(tmp_path / "text").shard(0)
    assert shard.document_span(10) == (50, 5)
    with pytest.raises(ValueError, match=r"text\.idx is damaged"):
        shard.document_span(50)
    with pytest.raises(ValueError, match=r"text\.idx is damaged"):
        BudgetOrder(open_dataset(tmp_path / "text"), num_tokens=400, key=1).prepare()


def test_documents_of_a_stretch_are_numbered(dataset: Dataset) -> None:
    order = BudgetOrder(dataset, num_tokens=dataset.num_tokens, key=2)
    reader = TokenReader(dataset, vocab_size=VOCAB_SIZE, mask_token_id=None)
    tokens, document = TokenStream(order, reader).read(100, 200)
    owner = {int(token): place for place, text in enumerate(documents(LENGTHS)) for token in text}
    owners = [owner[int(token)] for token in tokens]
    changes = np.array(owners[1:]) != np.array(owners[:-1])
    assert document.tolist() == [0, *np.cumsum(changes).tolist()]
