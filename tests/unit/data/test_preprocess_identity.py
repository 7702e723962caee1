"""The same bytes as Megatron's own writer, for any division of the work."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_tokenizer
import pytest
from mixed_corpus import MixedCorpus, make_mixed_corpus

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.preprocessing.preprocess import make_dataset, preprocess
from megatron_dlm.data.preprocessing.shard_set import completed_shards
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def settings(corpus: MixedCorpus, tmp_path: Path) -> PreprocessConfig:
    prefix = str(tmp_path / "one" / "text")
    return PreprocessConfig(
        corpus.files, prefix, corpus.tokenizer, workers=1, shard_size_bytes=30_000
    )


def files(prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()}


def our_tokenizer(corpus: MixedCorpus, directory: Path) -> str:
    return corpus.tokenizer


def gpt2_like(corpus: MixedCorpus, directory: Path) -> str:
    return str(huggingface_tokenizer.gpt2_like(directory / "gpt2"))


def large_vocabulary(corpus: MixedCorpus, directory: Path) -> str:
    """Beyond 16 bits."""
    directory = huggingface_tokenizer.gpt2_like(directory / "large")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    # Tokens added behind the vocabulary would move.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in vocabulary]
    unused = range(max(vocabulary.values()) + 1, 70_000)
    vocabulary.update({f"unused {number}": number for number in unused})
    path.write_text(json.dumps(content))
    return str(directory)


def llama3_like(corpus: MixedCorpus, directory: Path) -> str:
    return str(huggingface_tokenizer.llama3_like(directory / "llama3"))


@pytest.mark.parametrize("make", [our_tokenizer, large_vocabulary, gpt2_like, llama3_like])
def test_megatrons_writer_gives_the_same_bytes(
    make: Callable[[MixedCorpus, Path], str],
    corpus: MixedCorpus,
    settings: PreprocessConfig,
    tmp_path: Path,
) -> None:
    """Each shard, and all of them joined by Megatron against all documents written by it."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    settings = replace(settings, tokenizer=make(corpus, tmp_path))
    preprocess(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    encoded = [[*tokenizer.encode(text), tokenizer.eod_id] for text in corpus.texts]
    joined, whole = tmp_path / "joined", tmp_path / "whole"
    everything = IndexedDatasetBuilder(f"{whole}.bin", dtype=dtype)
    join = IndexedDatasetBuilder(f"{joined}.bin", dtype=dtype)
    remaining = iter(encoded)
    shards, missing = completed_shards(settings.output_prefix)
    assert len(shards) > 5
    assert missing == []
    for number, entry in enumerate(open_dataset(settings.output_prefix).entries):
        one = tmp_path / f"theirs_{number}"
        builder = IndexedDatasetBuilder(f"{one}.bin", dtype=dtype)
        for _ in range(entry.documents):
            document = next(remaining)
            builder.add_document(document, [len(document)])
            everything.add_document(document, [len(document)])
        builder.finalize(f"{one}.idx")
        join.add_index(entry.prefix)
        for suffix in (".bin", ".idx"):
            assert (
                Path(f"{entry.prefix}{suffix}").read_bytes() == Path(f"{one}{suffix}").read_bytes()
            )
    assert next(remaining, None) is None
    everything.finalize(f"{whole}.idx")
    join.finalize(f"{joined}.idx")
    for suffix in (".bin", ".idx"):
        assert Path(f"{joined}{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()


@pytest.mark.parametrize("encoder", ["fast", "reference"])
def test_any_encoder(
    encoder: str, settings: PreprocessConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(settings)
    prefix = str(tmp_path / encoder / "text")
    preprocess(replace(settings, output_prefix=prefix, encoder=encoder))
    assert ("gigatoken" in capsys.readouterr().out.split("encoder:")[2]) == (encoder == "fast")
    assert files(prefix) == files(settings.output_prefix)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers(workers: int, settings: PreprocessConfig, tmp_path: Path) -> None:
    settings = replace(settings, validation_fraction=0.1)
    preprocess(settings)
    prefix = str(tmp_path / "many" / "text")
    preprocess(replace(settings, output_prefix=prefix, workers=workers))
    assert files(prefix) == files(settings.output_prefix)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_any_number_of_array_tasks_in_any_order(
    count: int, settings: PreprocessConfig, tmp_path: Path
) -> None:
    """More tasks than jobs too; the one that ends last lists the shards."""
    settings = replace(settings, validation_fraction=0.1)
    preprocess(settings)
    shards, _ = completed_shards(settings.output_prefix)
    assert 5 < len(shards) < 20
    prefix = str(tmp_path / "array" / "text")
    order = random.Random(count).sample(range(count), count)
    done: set[int] = set()
    for index in order:
        task = replace(settings, output_prefix=prefix, array_index=index, array_count=count)
        missing = set(make_dataset(task).missing)
        done |= {job for job in range(100) if job % count == index}
        assert not missing & done
        assert bool(missing) != (tmp_path / "array" / "text.dataset.json").exists()
    assert not missing
    assert files(prefix) == files(settings.output_prefix)


def test_the_names_of_folders_do_not_matter(
    settings: PreprocessConfig, corpus: MixedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array task may see the same files under another path, and go on."""
    preprocess(replace(settings, array_index=0, array_count=2))
    (tmp_path / "link").symlink_to(corpus.directory / "input")
    moved = [str(tmp_path / "link" / Path(file).name) for file in corpus.files]
    monkeypatch.chdir(tmp_path)
    preprocess(replace(settings, input=moved, output_prefix="one/text"))
    before = files(settings.output_prefix)
    preprocess(settings)
    assert files(settings.output_prefix) == before
    assert open_dataset(settings.output_prefix).num_documents == len(corpus.texts)
