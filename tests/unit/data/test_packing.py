"""Every way of cutting text into windows scores each token as often as it says it does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unique_shards import VOCAB_SIZE, documents, write_unique

from megatron_dlm.data.document_order import Block, BudgetOrder, DocumentOrder, WholeOrder
from megatron_dlm.data.packing import (
    DocumentWindows,
    Sample,
    StreamWindows,
    Stride,
    Windows,
    best_fit_decreasing,
    cut_documents,
)
from megatron_dlm.data.token_stream import TokenReader


@pytest.mark.parametrize("seq_length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("extra_tokens", range(1, 24))
def test_strides_score_every_token_once(seq_length: int, extra_tokens: int) -> None:
    num_tokens = seq_length + extra_tokens
    stride = Stride(num_tokens, seq_length)
    diffusion, autoregressive = np.zeros(num_tokens + 1), np.zeros(num_tokens + 1)
    for window in range(stride.num_windows):
        columns = stride.start(window) + np.arange(seq_length + 1)
        valid = stride.valid(window)
        assert columns[0] >= 0
        assert columns[-1] <= num_tokens
        assert valid.dtype == bool
        np.add.at(diffusion, columns[:-1][valid[:-1]], 1)
        np.add.at(autoregressive, columns[1:][valid[1:]], 1)
    assert diffusion[:-1].tolist() == [1] * num_tokens
    assert autoregressive[:-1].tolist() == [0] + [1] * (num_tokens - 1)
    # The token after the stream does not exist and is never scored.
    assert diffusion[-1] == autoregressive[-1] == 0


def test_number_of_windows_is_the_ceiling() -> None:
    assert [Stride(n, 4).num_windows for n in (5, 8, 9, 12, 13)] == [2, 2, 3, 3, 4]


def open_windows(order: DocumentOrder, packing: str, seq_length: int) -> Windows:
    reader = TokenReader(order.dataset, vocab_size=VOCAB_SIZE, mask_token_id=None)
    if packing == "concat":
        return StreamWindows(order, reader, seq_length=seq_length, keep_documents=True)
    return DocumentWindows(order, reader, seq_length=seq_length, share_windows=packing == "pack")


def read_epoch(windows: Windows, seq_length: int) -> list[Sample]:
    samples = [windows.read(window) for window in range(windows.num_windows)]
    for sample in samples:
        assert sample.document is not None
        assert all(len(field) == seq_length + 1 for field in sample)
        kinds = [field.dtype for field in sample]
        assert kinds == [np.int64, np.bool_, np.int64]
    return samples


def check_documents(sample: Sample, owner: dict[int, int]) -> None:
    """Numbers 0, 1, 2 …; same number exactly where neighbours are of one document; filler alone."""
    tokens, valid, numbers = sample
    assert numbers is not None
    assert numbers[0] == 0
    assert set(np.diff(numbers).tolist()) <= {0, 1}
    text = np.flatnonzero(valid)
    last = int(text[-1])
    owners = [owner[int(token)] for token in tokens[: last + 1]]
    same = np.array(owners[1:]) == np.array(owners[:-1])
    assert (same == (np.diff(numbers[: last + 1]) == 0)).all()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=60).filter(lambda x: sum(x) > 20),
    seq_length=st.integers(2, 19),
    share=st.floats(0.2, 1.0),
    packing=st.sampled_from(["concat", "pack", "document"]),
    num_shards=st.integers(1, 3),
    whole=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_scores_every_token_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_length: int,
    share: float,
    packing: str,
    num_shards: int,
    whole: bool,
) -> None:
    dataset = write_unique(tmp_path_factory.mktemp("text") / "text", lengths, num_shards=num_shards)
    num_tokens = dataset.num_tokens if whole else max(20, int(share * dataset.num_tokens))
    order: DocumentOrder = WholeOrder(dataset, key=3)
    if not whole:
        order = BudgetOrder(dataset, num_tokens=num_tokens, key=3, block_documents=8)
    owner = {int(t): place for place, text in enumerate(documents(lengths)) for t in text}
    diffusion: Counter[int] = Counter()
    autoregressive: Counter[int] = Counter()
    begins = set()
    for sample in read_epoch(open_windows(order, packing, seq_length), seq_length):
        tokens, valid, _ = sample
        diffusion.update(tokens[:-1][valid[:-1]].tolist())
        autoregressive.update(tokens[1:][valid[1:]].tolist())
        check_documents(sample, owner)
        if valid[0]:
            begins.add(int(tokens[0]))
        elif packing != "concat":  # context: the token before the first one that is scored
            assert tokens[1] == tokens[0] + 1
            assert valid[1]
    assert set(diffusion.values()) == {1}
    assert len(diffusion) == num_tokens
    assert set(autoregressive.values()) == {1}
    missing = set(diffusion) - set(autoregressive)
    if packing == "concat":
        assert len(missing) == 1
    else:
        assert missing == begins


def test_pack_keeps_documents_whole_and_fills_the_windows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 900).tolist()
    dataset = write_unique(tmp_path / "text", lengths)
    order = BudgetOrder(dataset, num_tokens=dataset.num_tokens, key=1, block_documents=1024)
    windows = open_windows(order, "pack", 64)
    assert windows.num_windows * 64 < 1.04 * dataset.num_tokens
    texts = {tuple(text.tolist()) for text in documents(lengths)}
    found = []
    for tokens, valid, numbers in read_epoch(windows, 64):
        assert numbers is not None
        for number in range(int(numbers[valid].max()) + 1):
            found.append(tuple(tokens[(numbers == number) & valid].tolist()))
    assert sorted(found) == sorted(texts)


def test_one_document_a_window(tmp_path: Path) -> None:
    lengths = [5, 0, 16, 17, 3, 46]
    dataset = write_unique(tmp_path / "text", lengths)
    windows = open_windows(WholeOrder(dataset, key=1), "document", 16)
    # 17 tokens are pieces of 16 and 1 new, 46 are 16 + 15 + 15.
    assert windows.num_windows == 1 + 1 + 2 + 1 + 3
    for tokens, valid, numbers in read_epoch(windows, 16):
        assert numbers is not None
        assert set(numbers[valid]) == {0}
        size = int(np.flatnonzero(valid)[-1]) + 1
        assert (np.diff(tokens[:size]) == 1).all()
        assert (numbers[size:] == 1).all()
        assert not valid[-1]


def test_cutting_repeats_one_token() -> None:
    bounds = np.cumsum([0, 5, 0, 16, 17, 31, 32])
    pieces = cut_documents(Block(np.zeros(6), np.zeros(6), bounds), 16)
    assert pieces.documents.tolist() == [0, 2, 3, 3, 4, 4, 5, 5, 5]
    assert pieces.offsets.tolist() == [0, 0, 0, 15, 0, 15, 0, 15, 30]
    assert pieces.lengths.tolist() == [5, 16, 16, 2, 16, 16, 16, 16, 2]


@given(st.lists(st.integers(1, 50), max_size=80))
@settings(max_examples=200, deadline=None)
def test_best_fit_against_the_plain_rule(lengths: list[int]) -> None:
    """Longest first, each into the fullest bin that still takes it."""
    expected: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        room = [50 - sum(lengths[member] for member in members) for members in expected]
        fits = [place for place, free in enumerate(room) if free >= lengths[piece]]
        if fits:
            expected[min(fits, key=lambda place: room[place])].append(piece)
        else:
            expected.append([piece])
    assert best_fit_decreasing(np.array(lengths, dtype=np.int64), 50) == expected
