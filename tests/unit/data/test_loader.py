"""Epochs and budgets are exact, and batches depend on the step alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm.data.loader import Corpus, batches, open_corpus
from megatron_dlm.data.manifest import Manifest, manifest_path
from megatron_dlm.data.shards import ShardWriter
from megatron_dlm.ops.batch import TokenBatch

SIZES = {"a": 1003, "b": 600, "c": 2000}
FIRST_IDS = {"a": 10, "b": 2000, "c": 4000}
VOCAB_SIZE, MASK_ID = 7000, 4
SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards in which every token id occurs once."""
    directory = tmp_path_factory.mktemp("shards")
    for name, size in SIZES.items():
        write(directory / name, np.arange(size) + FIRST_IDS[name])
    return directory


def write(prefix: Path, tokens: np.ndarray, *, vocab_size: int = VOCAB_SIZE) -> None:
    lengths = [len(part) for part in np.array_split(tokens, 40)]
    with ShardWriter(
        prefix, vocab_size=vocab_size, tokenizer_sha256="aa", mask_id=MASK_ID
    ) as writer:
        writer.add_documents(tokens, lengths)
        writer.publish()


def make(shards: Path, weights: Mapping[str, float] | None = None, **fields: object) -> Corpus:
    values = {"seq_length": SEQ_LENGTH, "seed": 5, "vocab_size": VOCAB_SIZE, **fields}
    prefixes = {str(shards / name): weight for name, weight in (weights or {"a": 1.0}).items()}
    return open_corpus(prefixes, **{"mask_token_id": MASK_ID, **values})  # type: ignore[arg-type]


def scored_tokens(corpus: Corpus, first: int, count: int) -> tuple[Counter[int], Counter[int]]:
    """How often each token is a diffusion target, and an autoregressive one."""
    diffusion: Counter[int] = Counter()
    autoregressive: Counter[int] = Counter()
    for index in range(first, first + count):
        tokens, valid = corpus.sample(index)
        diffusion.update(tokens[:-1][valid[:-1]].tolist())
        autoregressive.update(tokens[1:][valid[1:]].tolist())
    return diffusion, autoregressive


@pytest.mark.parametrize("budget", [17, 32, 33, 500, 1003, None])
def test_every_epoch_scores_every_unique_token_once(shards: Path, budget: int | None) -> None:
    corpus = make(shards, unique_tokens=budget)
    expected_tokens = budget or SIZES["a"]
    assert corpus.unique_tokens == expected_tokens
    assert corpus.num_windows == -(-expected_tokens // SEQ_LENGTH)
    seen = set()
    for epoch in range(3):
        first = epoch * corpus.num_windows
        diffusion, autoregressive = scored_tokens(corpus, first, corpus.num_windows)
        assert set(diffusion.values()) == set(autoregressive.values()) == {1}
        assert len(diffusion) == expected_tokens
        assert len(autoregressive) == expected_tokens - 1
        assert set(autoregressive) < set(diffusion)
        seen |= set(diffusion)
    assert len(seen) == expected_tokens


def test_each_epoch_has_its_own_order(shards: Path) -> None:
    corpus = make(shards)
    orders = [
        [corpus.locate(epoch * corpus.num_windows + step)[2] for step in range(corpus.num_windows)]
        for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(corpus.num_windows)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_smaller_budgets_are_inside_larger_ones(shards: Path) -> None:
    blend = {"a": 0.2, "b": 0.3, "c": 0.5}
    smaller: set[int] = set()
    for budget in (100, 101, 500, 1500, 2000):
        corpus = make(shards, blend, unique_tokens=budget)
        diffusion, _ = scored_tokens(corpus, 0, corpus.num_windows)
        assert len(diffusion) == budget
        assert smaller < set(diffusion)
        smaller = set(diffusion)


def test_a_budgeted_blend_has_exact_epochs_and_shares(shards: Path) -> None:
    corpus = make(shards, {"a": 0.2, "b": 0.3, "c": 0.5}, unique_tokens=1500)
    for epoch in range(2):
        diffusion, _ = scored_tokens(corpus, epoch * corpus.num_windows, corpus.num_windows)
        assert set(diffusion.values()) == {1}
        parts = [sum(FIRST_IDS[n] <= t < FIRST_IDS[n] + SIZES[n] for t in diffusion) for n in SIZES]
        assert parts == [300, 450, 750]


def test_weights_without_a_budget_set_how_often_a_dataset_is_drawn(shards: Path) -> None:
    weights = {"a": 3.0, "b": 1.0, "c": 2.0}
    corpus = make(shards, weights)
    assert corpus.unique_tokens == sum(SIZES.values())
    counts = np.zeros(3)
    for index in range(600):
        counts[corpus.locate(index)[0]] += 1
        shares = np.array(list(weights.values())) / 6 * (index + 1)
        assert np.abs(counts - shares).max() <= 1


def test_windows_are_neighbours_in_the_stream(shards: Path) -> None:
    """Tokens of a window follow each other in the documents, apart from document starts."""
    corpus = make(shards)
    tokens, _ = corpus.sample(0)
    assert (np.diff(tokens) == 1).mean() > 0.8


def test_sample_types(shards: Path) -> None:
    tokens, valid = make(shards).sample(10**12)
    assert (tokens.dtype, valid.dtype) == (np.int64, np.bool_)
    assert tokens.shape == valid.shape == (SEQ_LENGTH + 1,)


def collect(corpus: Corpus, **fields: int) -> list[list[TokenBatch]]:
    values = {"start_step": 0, "num_steps": 3, "global_batch_size": 8, "micro_batch_size": 2}
    return list(batches(corpus, **{**values, "data_rank": 0, "data_size": 1, **fields}))


def flatten(steps: list[list[TokenBatch]]) -> list[dict[int, tuple[list[int], list[bool]]]]:
    """For each step: sample number -> (tokens, valid)."""
    return [
        {
            int(number): (tokens.tolist(), valid.tolist())
            for batch in step
            for number, tokens, valid in zip(
                batch.sample_index, batch.tokens, batch.valid, strict=True
            )
        }
        for step in steps
    ]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8)])
def test_any_split_holds_the_same_samples(shards: Path, micro: int, ranks: int) -> None:
    corpus = make(shards)
    expected = flatten(collect(corpus))
    assert [list(step) for step in expected] == [list(range(k * 8, k * 8 + 8)) for k in range(3)]
    split = [
        collect(corpus, micro_batch_size=micro, data_rank=rank, data_size=ranks)
        for rank in range(ranks)
    ]
    for step in range(3):
        merged: dict[int, tuple[list[int], list[bool]]] = {}
        for number in range(8 // (micro * ranks)):
            for rank in range(ranks):
                merged.update(flatten([[split[rank][step][number]]])[0])
        # Micro-batch by micro-batch, rank by rank, is the global order.
        assert list(merged.items()) == list(expected[step].items())


def test_restart_equals_an_uninterrupted_run(shards: Path) -> None:
    whole = flatten(collect(make(shards), num_steps=20))
    assert flatten(collect(make(shards), start_step=13, num_steps=7)) == whole[13:]


def test_batch_types_and_shapes(shards: Path) -> None:
    batch = collect(make(shards))[0][0]
    assert (batch.tokens.dtype, batch.valid.dtype) == (torch.int64, torch.bool)
    assert batch.tokens.shape == batch.valid.shape == (2, SEQ_LENGTH + 1)
    assert batch.sample_index.tolist() == [0, 1]
    assert batch.sample_index.dtype == torch.int64
    cropped = batch.crop(5)
    assert torch.equal(cropped.tokens, batch.tokens[:, :6])
    assert torch.equal(cropped.valid, batch.valid[:, :6])


def test_digest_identifies_the_data_and_not_its_place(shards: Path, tmp_path: Path) -> None:
    base = make(shards).digest
    for file in shards.iterdir():
        shutil.copy(file, tmp_path)
    assert make(tmp_path).digest == base
    others = [
        make(shards, seed=6),
        make(shards, unique_tokens=500),
        make(shards, seq_length=8),
        make(shards, {"b": 1.0}),
        make(shards, {"a": 1.0, "b": 1.0}),
        make(shards, {"a": 1.0, "b": 2.0}),
    ]
    assert len({base, *(corpus.digest for corpus in others)}) == 7


@pytest.mark.parametrize("place", [0, -1])
def test_digest_notices_other_text_of_the_same_length(
    shards: Path, tmp_path: Path, place: int
) -> None:
    for file in shards.iterdir():
        shutil.copy(file, tmp_path)
    tokens = np.fromfile(tmp_path / "a.bin", dtype=np.uint16)
    tokens[place] ^= 1
    tokens.tofile(tmp_path / "a.bin")
    assert make(tmp_path).digest != make(shards).digest


def test_a_budget_larger_than_the_corpus_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"asks for 1004 tokens, but .*/a holds 1003"):
        make(shards, unique_tokens=1004)
    message = (
        r"asks for 2500 tokens, of which 750 from this shard by its weight, but .*/b holds 600"
    )
    with pytest.raises(ValueError, match=message):
        make(shards, {"c": 0.7, "b": 0.3}, unique_tokens=2500, seq_length=8)


def test_sequences_longer_than_the_text_are_refused(shards: Path) -> None:
    message = r"sequence longer than the document set: .*/a gives 1003 .*model\.seq_length 1003"
    with pytest.raises(ValueError, match=message):
        make(shards, seq_length=1003)
    with pytest.raises(ValueError, match="gives 16 tokens"):
        make(shards, unique_tokens=16)
    assert make(shards, seq_length=1002).num_windows == 2


def test_shards_of_another_tokenizer_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"sha256 aa, data\.tokenizer has bb"):
        make(shards, tokenizer_sha256="bb")
    with pytest.raises(ValueError, match="vocabulary of 7000, the model one of 6999"):
        make(shards, vocab_size=6999)
    with pytest.raises(ValueError, match=r"mask_token_id 5 .*reserved mask id 4, largest id 1012"):
        make(shards, mask_token_id=5)
    assert make(shards, mask_token_id=5000, tokenizer_sha256="aa").num_windows == 63
    assert make(shards, mask_token_id=None).num_windows == 63
    with pytest.raises(ValueError, match="no shards are given"):
        open_corpus({}, seq_length=4, seed=1, vocab_size=10, mask_token_id=None)


def test_bad_ids_are_found_when_read(tmp_path: Path) -> None:
    """A shard without a manifest, as Megatron-LM writes it, is checked sample by sample."""
    write(tmp_path / "a", np.arange(5, 105))
    manifest_path(tmp_path / "a").unlink()
    corpus = make(tmp_path, vocab_size=105, mask_token_id=None)
    assert len(scored_tokens(corpus, 0, corpus.num_windows)[0]) == 100
    for fields, message in [
        ({"vocab_size": 104, "mask_token_id": None}, r"a holds token id 104, outside .* of 104"),
        ({"vocab_size": 105, "mask_token_id": 50}, r"a holds token id 50, the mask id"),
    ]:
        corpus = make(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            scored_tokens(corpus, 0, corpus.num_windows)
        with pytest.raises(ValueError, match=message):
            collect(corpus)


def test_a_manifest_may_promise_less_than_the_model_allows(tmp_path: Path) -> None:
    write(tmp_path / "a", np.arange(5, 105), vocab_size=200)
    manifest = Manifest.read(tmp_path / "a")
    assert manifest is not None
    replace(manifest, tokenizer_sha256=None).write(tmp_path / "a")
    assert make(tmp_path, tokenizer_sha256="bb").unique_tokens == 100
