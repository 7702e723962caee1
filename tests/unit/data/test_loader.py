"""Batches depend on the step alone: not on the ranks, the micro-batches, or a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unique_shards import MASK_ID, VOCAB_SIZE, write_unique

from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.loader import batches
from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.data.storage.manifest import manifest_path
from megatron_dlm.ops.batch import TokenBatch

SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "text"
    write_unique(path, [25] * 40, num_shards=3)
    return path


def make(prefix: Path, packing: str = "concat", unique_tokens: int | None = None) -> Corpus:
    settings = CorpusSettings(
        seq_length=SEQ_LENGTH,
        seed=5,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        unique_tokens=unique_tokens,
        packing=packing,  # type: ignore[arg-type]
    )
    return open_corpus({str(prefix): 1.0}, settings)


def collect(corpus: Corpus, **fields: int) -> list[list[TokenBatch]]:
    values = {"start_step": 0, "num_steps": 3, "global_batch_size": 8, "micro_batch_size": 2}
    return list(batches(corpus, **{**values, "data_rank": 0, "data_size": 1, **fields}))


def flatten(steps: list[list[TokenBatch]]) -> list[dict[int, tuple[list[int], ...]]]:
    """For each step: sample number -> its row of every field."""
    return [
        {
            int(number): tuple(field[row].tolist() for field in fields(batch))
            for batch in step
            for row, number in enumerate(batch.sample_index)
        }
        for step in steps
    ]


def fields(batch: TokenBatch) -> list[torch.Tensor]:
    rows = [batch.tokens, batch.valid]
    return rows if batch.document is None else [*rows, batch.document]


@pytest.mark.parametrize("packing", ["concat", "pack"])
@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_any_split_holds_the_same_samples(
    prefix: Path, packing: str, micro: int, ranks: int
) -> None:
    corpus = make(prefix, packing)
    expected = flatten(collect(corpus))
    assert [list(step) for step in expected] == [list(range(k * 8, k * 8 + 8)) for k in range(3)]
    split = [
        collect(make(prefix, packing), micro_batch_size=micro, data_rank=rank, data_size=ranks)
        for rank in range(ranks)
    ]
    for step in range(3):
        merged: dict[int, tuple[list[int], ...]] = {}
        for number in range(8 // (micro * ranks)):
            for rank in range(ranks):
                merged.update(flatten([[split[rank][step][number]]])[0])
        # Micro-batch by micro-batch, rank by rank, is the global order.
        assert list(merged.items()) == list(expected[step].items())


@pytest.mark.parametrize("packing", ["concat", "pack", "document"])
@pytest.mark.parametrize("unique_tokens", [None, 300])
def test_restart_equals_an_uninterrupted_run(
    prefix: Path, packing: str, unique_tokens: int | None
) -> None:
    """300 tokens are passed many times in 20 steps, also across the restarts."""
    whole = flatten(collect(make(prefix, packing, unique_tokens), num_steps=20))
    for start in (1, 7, 13, 19):
        corpus = make(prefix, packing, unique_tokens)
        rest = flatten(collect(corpus, start_step=start, num_steps=20 - start))
        assert rest == whole[start:]


def test_batch_types_and_shapes(prefix: Path) -> None:
    batch = collect(make(prefix))[0][0]
    assert (batch.tokens.dtype, batch.valid.dtype) == (torch.int64, torch.bool)
    assert batch.tokens.shape == batch.valid.shape == (2, SEQ_LENGTH + 1)
    assert batch.sample_index.tolist() == [0, 1]
    assert batch.sample_index.dtype == torch.int64
    assert batch.document is None


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_documents_are_in_the_batch(prefix: Path, packing: str) -> None:
    batch = collect(make(prefix, packing))[0][0]
    assert batch.document is not None
    assert (batch.document.dtype, batch.document.shape) == (torch.int64, batch.tokens.shape)


def test_a_bad_id_arrives_at_its_step(tmp_path: Path) -> None:
    write_unique(tmp_path / "text", [25] * 40)
    manifest_path(tmp_path / "text").unlink()
    settings = CorpusSettings(SEQ_LENGTH, seed=5, vocab_size=VOCAB_SIZE, mask_token_id=None)
    prefixes = {str(tmp_path / "text"): 1.0}
    unchecked = open_corpus(prefixes, settings)
    step = next(n for n in range(20) if has_token(unchecked, 4 * n, 4 * n + 4, token=999))
    corpus = open_corpus(prefixes, replace(settings, mask_token_id=999))
    steps = batches(
        corpus,
        start_step=0,
        num_steps=20,
        global_batch_size=4,
        micro_batch_size=4,
        data_rank=0,
        data_size=1,
    )
    for _ in range(step):
        next(steps)
    with pytest.raises(ValueError, match="text holds token id 999, the mask id"):
        next(steps)


def has_token(corpus: Corpus, first: int, last: int, *, token: int) -> bool:
    return any((corpus.sample(index).tokens == token).any() for index in range(first, last))
