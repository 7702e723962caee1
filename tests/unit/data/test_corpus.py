"""Epochs, budgets and blends are exact; what does not fit the run is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unique_shards import MASK_ID, VOCAB_SIZE, write_unique

from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.data.storage.manifest import Manifest, manifest_path
from megatron_dlm.data.storage.shard_writer import ShardWriter

SIZES = {"a": 1003, "b": 600, "c": 2000}
FIRST_IDS = {"a": 10, "b": 2000, "c": 4000}
SEQ_LENGTH = 16
SETTINGS = CorpusSettings(
    seq_length=SEQ_LENGTH, seed=5, vocab_size=VOCAB_SIZE, mask_token_id=MASK_ID
)
BLEND = {"a": 0.2, "b": 0.3, "c": 0.5}


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets; no token id occurs twice."""
    return write_tiers(tmp_path_factory.mktemp("tiers"))


def write_tiers(directory: Path, num_shards: int = 1) -> Path:
    for name, size in SIZES.items():
        lengths = [len(part) for part in np.array_split(np.arange(size), 40)]
        write_unique(directory / name, lengths, num_shards=num_shards, first_id=FIRST_IDS[name])
    return directory


def make(tiers: Path, weights: Mapping[str, float] | None = None, **fields: Any) -> Corpus:
    prefixes = {str(tiers / name): weight for name, weight in (weights or {"a": 1.0}).items()}
    return open_corpus(prefixes, replace(SETTINGS, **fields))


def scored_tokens(corpus: Corpus, first: int, count: int) -> tuple[Counter[int], Counter[int]]:
    """How often each token is a diffusion target, and an autoregressive one."""
    diffusion: Counter[int] = Counter()
    autoregressive: Counter[int] = Counter()
    for index in range(first, first + count):
        tokens, valid, _ = corpus.sample(index)
        diffusion.update(tokens[:-1][valid[:-1]].tolist())
        autoregressive.update(tokens[1:][valid[1:]].tolist())
    return diffusion, autoregressive


@pytest.mark.parametrize("budget", [17, 32, 33, 500, 1003, None])
def test_every_epoch_scores_every_unique_token_once(tiers: Path, budget: int | None) -> None:
    corpus = make(tiers, unique_tokens=budget)
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


@pytest.mark.parametrize("packing", ["concat", "pack", "document"])
def test_each_epoch_is_a_bijection_in_its_own_order(tiers: Path, packing: str) -> None:
    corpus = make(tiers, packing=packing, unique_tokens=900)
    orders = [
        [corpus.locate(epoch * corpus.num_windows + step)[2] for step in range(corpus.num_windows)]
        for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(corpus.num_windows)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for epoch in range(2):
        diffusion, _ = scored_tokens(corpus, epoch * corpus.num_windows, corpus.num_windows)
        assert set(diffusion.values()) == {1}
        assert len(diffusion) == 900


@pytest.mark.parametrize("packing", ["concat", "pack"])
def test_smaller_budgets_are_inside_larger_ones(tiers: Path, packing: str) -> None:
    smaller: set[int] = set()
    for budget in (100, 101, 500, 1500, 2000):
        corpus = make(tiers, BLEND, unique_tokens=budget, packing=packing)
        diffusion, _ = scored_tokens(corpus, 0, corpus.num_windows)
        assert len(diffusion) == budget
        assert smaller < set(diffusion)
        smaller = set(diffusion)


def test_a_budgeted_blend_has_exact_epochs_and_shares(tiers: Path) -> None:
    corpus = make(tiers, BLEND, unique_tokens=1500)
    for epoch in range(2):
        diffusion, _ = scored_tokens(corpus, epoch * corpus.num_windows, corpus.num_windows)
        assert set(diffusion.values()) == {1}
        parts = [sum(FIRST_IDS[n] <= t < FIRST_IDS[n] + SIZES[n] for t in diffusion) for n in SIZES]
        assert parts == [300, 450, 750]


def test_weights_without_a_budget_set_how_often_a_tier_is_drawn(tiers: Path) -> None:
    weights = {"a": 3.0, "b": 1.0, "c": 2.0}
    corpus = make(tiers, weights)
    assert corpus.unique_tokens == sum(SIZES.values())
    counts = np.zeros(3)
    for index in range(600):
        counts[corpus.locate(index)[0]] += 1
        shares = np.array(list(weights.values())) / 6 * (index + 1)
        assert np.abs(counts - shares).max() <= 1


@pytest.mark.parametrize("num_shards", [2, 7])
def test_samples_of_a_budget_do_not_depend_on_the_shards(
    tiers: Path, tmp_path: Path, num_shards: int
) -> None:
    other = write_tiers(tmp_path, num_shards)
    for packing in ("concat", "pack", "document"):
        fields: dict[str, Any] = {"unique_tokens": 1200, "packing": packing}
        one, two = make(tiers, BLEND, **fields), make(other, BLEND, **fields)
        assert one.num_windows == two.num_windows
        for index in range(0, 3 * one.num_windows, 7):
            for left, right in zip(one.sample(index), two.sample(index), strict=True):
                assert np.array_equal(left, right)


def test_windows_are_neighbours_in_the_stream(tiers: Path) -> None:
    """Tokens of a window follow each other in the documents, apart from document starts."""
    tokens, valid, document = make(tiers).sample(0)
    assert document is None
    assert (np.diff(tokens[valid]) == 1).mean() > 0.8


def test_document_boundaries_are_given_on_request(tiers: Path) -> None:
    for fields in ({"resets_attention": True}, {"packing": "pack"}, {"packing": "document"}):
        sample = make(tiers, **fields).sample(3)
        assert sample.document is not None
        assert sample.document.shape == (SEQ_LENGTH + 1,)
    plain = make(tiers).sample(10**12)
    kept = make(tiers, resets_attention=True).sample(10**12)
    assert np.array_equal(plain.tokens, kept.tokens)
    assert np.array_equal(plain.valid, kept.valid)


def test_opening_a_whole_corpus_reads_no_shard(tmp_path: Path) -> None:
    corpus = make(write_tiers(tmp_path, 3), BLEND)
    corpus.prepare()
    assert corpus.num_windows == sum(-(-size // SEQ_LENGTH) for size in SIZES.values())
    assert all(dataset._shards == {} for dataset in corpus.datasets)


@pytest.mark.parametrize("packing", ["concat", "pack"])
def test_report_says_what_the_samples_take(tiers: Path, packing: str) -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    corpus = make(tiers, weights, packing=packing)
    for num_samples in (0, 1, 50, 333, 2000):
        rows = corpus.report(num_samples)
        drawn = Counter(corpus.locate(index)[0] for index in range(num_samples))
        assert [row.samples for row in rows] == [drawn[place] for place in range(3)]
        for place, row in enumerate(rows):
            name = "abc"[place]
            assert (row.name, row.prefix) == (name, str(tiers / name))
            assert row.weight == weights[name]
            assert row.available_tokens == row.unique_tokens == SIZES[name]
            assert row.epochs == row.samples / corpus.tiers[place].windows.num_windows
            seen = count_seen(corpus, place, num_samples)
            tolerance = 0 if row.epochs >= 1 or num_samples == 0 else SEQ_LENGTH * 2
            assert abs(row.seen_tokens - seen) <= tolerance
    assert sum(row.seen_tokens for row in corpus.report(10**9)) == sum(SIZES.values())


def count_seen(corpus: Corpus, tier: int, num_samples: int) -> int:
    seen: set[int] = set()
    for index in range(num_samples):
        place, _, _ = corpus.locate(index)
        if place == tier:
            tokens, valid, _ = corpus.sample(index)
            seen.update(tokens[:-1][valid[:-1]].tolist())
    return len(seen)


def test_progress_names_the_tiers(tiers: Path, tmp_path: Path) -> None:
    corpus = make(tiers, BLEND, unique_tokens=1500)
    half = corpus.num_windows // 2
    assert make(tiers).progress(0) == {"epoch": 0, "unique_tokens": 0}
    values = corpus.progress(half)
    assert list(values) == [
        "epoch", "unique_tokens", "epoch/a", "unique_tokens/a", "epoch/b", "unique_tokens/b",
        "epoch/c", "unique_tokens/c",
    ]  # fmt: skip
    assert values["epoch"] == half / corpus.num_windows
    assert values["unique_tokens"] == sum(values[f"unique_tokens/{name}"] for name in "abc")
    done = corpus.progress(2 * corpus.num_windows)
    assert [done[f"epoch/{name}"] for name in "abc"] == [2, 2, 2]
    assert [done[f"unique_tokens/{name}"] for name in "abc"] == [300, 450, 750]
    for quality in ("low", "high"):
        write_unique(tmp_path / quality / "text", [40, 50])
    write_unique(tmp_path / "high" / "code", [40, 50])
    prefixes = {str(tmp_path / name): 1.0 for name in ("low/text", "high/text", "high/code")}
    names = [tier.name for tier in open_corpus(prefixes, SETTINGS).tiers]
    assert names == ["low/text", "high/text", "high/code"]


def test_digest_identifies_the_data_and_not_its_place(tiers: Path, tmp_path: Path) -> None:
    base = make(tiers).digest
    for file in tiers.iterdir():
        shutil.copy(file, tmp_path)
    assert make(tmp_path).digest == base
    others = [
        make(tiers, seed=6),
        make(tiers, unique_tokens=500),
        make(tiers, seq_length=8),
        make(tiers, packing="pack"),
        make(tiers, resets_attention=True),
        make(tiers, {"b": 1.0}),
        make(tiers, {"a": 1.0, "b": 1.0}),
        make(tiers, {"a": 1.0, "b": 2.0}),
    ]
    assert len({base, *(corpus.digest for corpus in others)}) == 9


@pytest.mark.parametrize("place", [0, -1])
def test_digest_notices_other_text_of_the_same_length(
    tiers: Path, tmp_path: Path, place: int
) -> None:
    for directory in ("one", "two"):
        shutil.copytree(tiers, tmp_path / directory)
        manifest_path(tmp_path / directory / "a").unlink()
    assert make(tmp_path / "one").digest == make(tmp_path / "two").digest
    tokens = np.fromfile(tmp_path / "two" / "a.bin", dtype=np.uint16)
    tokens[place] ^= 1
    tokens.tofile(tmp_path / "two" / "a.bin")
    assert make(tmp_path / "one").digest != make(tmp_path / "two").digest


def test_a_budget_larger_than_the_corpus_is_refused(tiers: Path) -> None:
    with pytest.raises(ValueError, match=r"asks for 1004 tokens, but .*/a holds 1003"):
        make(tiers, unique_tokens=1004)
    message = r"asks for 2500 tokens, of which 750 from this one by its weight, but .*/b holds 600"
    with pytest.raises(ValueError, match=message):
        make(tiers, {"c": 0.7, "b": 0.3}, unique_tokens=2500, seq_length=8)


def test_sequences_longer_than_the_text_are_refused(tiers: Path) -> None:
    message = r"sequence longer than the document set: .*/a gives 1003 .*model\.seq_length 1003"
    with pytest.raises(ValueError, match=message):
        make(tiers, seq_length=1003)
    with pytest.raises(ValueError, match="gives 16 tokens"):
        make(tiers, unique_tokens=16)
    assert make(tiers, seq_length=1002).num_windows == 2
    assert make(tiers, seq_length=2000, packing="pack").num_windows == 1


def test_text_of_another_tokenizer_is_refused(tiers: Path) -> None:
    with pytest.raises(ValueError, match=r"sha256 aa, data\.tokenizer has bb"):
        make(tiers, tokenizer_sha256="bb")
    with pytest.raises(ValueError, match="vocabulary of 60000, the model one of 59999"):
        make(tiers, vocab_size=59_999)
    with pytest.raises(ValueError, match=r"mask_token_id 5 .*reserved mask id 4, largest id 1012"):
        make(tiers, mask_token_id=5)
    assert make(tiers, mask_token_id=5000, tokenizer_sha256="aa").num_windows == 63
    assert make(tiers, mask_token_id=None).num_windows == 63
    with pytest.raises(ValueError, match="no datasets are given"):
        open_corpus({}, SETTINGS)


def test_bad_ids_are_found_when_read(tmp_path: Path) -> None:
    """A shard without a manifest, as Megatron-LM writes it, is checked sample by sample."""
    write_unique(tmp_path / "a", [30, 70], first_id=5)
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


def test_the_shard_of_a_bad_id_is_named(tmp_path: Path) -> None:
    write_unique(tmp_path / "a", [30, 30, 30, 30], num_shards=4, first_id=100)
    for path in tmp_path.glob("*00002_000.bin"):
        tokens = np.fromfile(path, dtype=np.uint16)
        tokens[17] = 50_000
        tokens.tofile(path)
    corpus = make(tmp_path, vocab_size=VOCAB_SIZE, mask_token_id=50_000)
    with pytest.raises(ValueError, match=r"a_00002_000 holds token id 50000, the mask id"):
        scored_tokens(corpus, 0, corpus.num_windows)


def test_a_manifest_may_promise_less_than_the_model_allows(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", vocab_size=200, mask_id=MASK_ID) as writer:
        writer.add_document(np.arange(5, 105))
        writer.publish()
    manifest = Manifest.read(tmp_path / "a")
    assert manifest is not None
    assert manifest.tokenizer_sha256 is None
    assert make(tmp_path, tokenizer_sha256="bb").unique_tokens == 100
