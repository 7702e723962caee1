"""Joined shards equal Megatron's merge byte for byte; a list names each shard once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_shards import (
    all_documents,
    origin_of,
    random_documents,
    write_megatron_shard,
    write_shard,
)

from megatron_dlm import cli
from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.commands import merge as merge_module
from megatron_dlm.data.commands.merge import join_shards
from megatron_dlm.data.storage.dataset import open_dataset, overlap, write_dataset
from megatron_dlm.data.storage.dataset_names import find_datasets, find_shards
from megatron_dlm.data.storage.manifest import HeldOut, Manifest, Source
from megatron_dlm.data.storage.shards import Shard


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def megatrons_merge(shards: list[str], target: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    dtype = IndexedDataset(shards[0]).index.dtype
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=dtype)
    for shard in shards:
        builder.add_index(shard)
    builder.finalize(f"{target}.idx")


def assert_equal_bytes(one: Path, two: Path) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{two}{suffix}").read_bytes(), suffix


@pytest.mark.parametrize("vocab_size", [500, 70000])
def test_copy_is_identical_to_megatrons_merge(
    tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_COPY_BYTES", 64)
    monkeypatch.setattr(merge_module, "_INDEX_ITEMS", 3)
    parts = [
        write_shard(tmp_path / f"part{n}", random_documents(size, n), vocab_size=vocab_size)
        for n, size in enumerate((7, 0, 1, 12))
    ]
    copied_bytes: list[int] = []
    manifest = join_shards(parts, tmp_path / "whole", copied_bytes.append)
    megatrons_merge(parts, tmp_path / "theirs")
    assert_equal_bytes(tmp_path / "whole", tmp_path / "theirs")
    assert sum(copied_bytes) == os.stat(tmp_path / "whole.bin").st_size
    assert manifest == Manifest.read(tmp_path / "whole")
    assert manifest is not None
    assert (manifest.bin_sha256, manifest.idx_sha256) == (
        sha256(tmp_path / "whole.bin"),
        sha256(tmp_path / "whole.idx"),
    )
    assert (manifest.documents, manifest.vocab_size, manifest.eod_id) == (20, vocab_size, 1)
    assert Shard(tmp_path / "whole").num_tokens == manifest.tokens


def test_copy_of_megatrons_own_shards(tmp_path: Path) -> None:
    one = write_megatron_shard(tmp_path / "one", [[[1, 2], [3]], [], [[4], []]])
    two = write_megatron_shard(tmp_path / "two", [[[5]], [[6, 7], [8, 9]], []])
    assert join_shards([one, two], tmp_path / "whole") is None
    megatrons_merge([one, two], tmp_path / "theirs")
    assert_equal_bytes(tmp_path / "whole", tmp_path / "theirs")
    assert not (tmp_path / "whole.manifest.json").exists()
    expected = [[1, 2, 3], [], [4], [5], [6, 7, 8, 9], []]
    shard = Shard(tmp_path / "whole")
    assert [shard.document(n).tolist() for n in range(6)] == expected
    assert all_documents([str(tmp_path / "whole")]) == expected


def test_manifest_of_a_copy_says_what_its_parts_say(tmp_path: Path) -> None:
    parts = []
    for n in range(2):
        settings = dict(origin=origin_of("text", "recipe", part=n), held_out=HeldOut(0.1, "train"))
        parts.append(
            write_shard(tmp_path / f"p{n}", [[7 + n, 1]], text_bytes=10 + n,
                        left_out={"invalid_json": 1 + n}, **settings)
        )  # fmt: skip
        manifest = Manifest.read(parts[-1])
        assert manifest is not None
        Manifest(**{**vars(manifest), "sources": [Source("a", n, n + 1)]}).write(parts[-1])
    whole = join_shards(parts, tmp_path / "whole")
    assert whole is not None
    assert whole.sources == [Source("a", 0, 1), Source("a", 1, 2)]
    assert (whole.left_out, whole.text_bytes) == ({"invalid_json": 3}, 21)
    assert (whole.max_token_id, whole.held_out) == (8, HeldOut(0.1, "train"))
    assert whole.origin is not None
    assert whole.origin.sha256 == "text"
    # the copy and its parts hold the same text, and no shard of the run is taken for the copy
    assert whole.origin.recipe_sha256 != "recipe"
    copy = open_dataset(tmp_path / "whole")
    assert overlap(open_dataset(parts[0]), copy) == "the same input files"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_shard(p, [[5, 1]], vocab_size=70000, tokenizer_sha256="t"), "vocab_size"),
        (lambda p: write_megatron_shard(p, [[[5]]]), "uint16 in .*one, int32 in .*two"),
        (lambda p: p, r"two\.idx does not exist"),
    ],
)
def test_shards_that_cannot_be_one(tmp_path: Path, make, message: str) -> None:
    one = write_shard(tmp_path / "one", [[5, 1]])
    two = str(make(tmp_path / "two"))
    with pytest.raises(ValueError, match=message):
        join_shards([one, two], tmp_path / "whole")
    assert list(tmp_path.glob("whole*")) == []


def test_copy_refuses_itself_and_what_changed(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "one", random_documents(9))
    with pytest.raises(ValueError, match="one is one of the shards to copy"):
        join_shards([one], tmp_path / "one")
    with open(f"{one}.bin", "r+b") as stream:
        stream.write(b"\x05")
    with pytest.raises(ValueError, match=r"one\.bin changed since its manifest"):
        join_shards([one], tmp_path / "whole")
    assert list(tmp_path.glob("whole*")) == []
    with pytest.raises(ValueError, match="store nothing"):
        join_shards([], tmp_path / "whole")


def test_copy_of_a_damaged_index_names_the_document(tmp_path: Path) -> None:
    one = write_megatron_shard(tmp_path / "one", [[[5, 6]], [[7]], [[8]]])
    with open(f"{one}.idx", "r+b") as stream:
        stream.seek(34 + 4)
        stream.write(b"\x02")
    with pytest.raises(ValueError, match=r"document 1 \(sequence 1\) has 2 tokens from byte 8"):
        join_shards([one], tmp_path / "whole")


def run(*arguments: object) -> int:
    return cli.main(["data", "merge", *map(str, arguments)])


def test_list_of_any_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested = write_dataset(tmp_path / "nested", [write_shard(tmp_path / "n1", [[5, 1], [6, 1]])])
    theirs = write_megatron_shard(tmp_path / "theirs_2", [[[7, 1]]], np.uint16)
    also = write_megatron_shard(tmp_path / "theirs_10", [[[8, 1]]], np.uint16)
    pattern = tmp_path / "theirs_*"
    assert run("--input", pattern, nested.prefix, "--output_prefix", tmp_path / "all") == 0
    merged = open_dataset(tmp_path / "all")
    prefixes = [os.path.realpath(entry.prefix) for entry in merged.entries]
    assert prefixes == [theirs, also, str(tmp_path / "n1")]
    assert (merged.num_documents, merged.num_tokens) == (4, 8)
    assert " 4 " in capsys.readouterr().out
    copied = tmp_path / "copied"
    assert run("--input", tmp_path / "all", "--output_prefix", copied, "--copy", "true") == 0
    assert all_documents([str(copied)]) == [[7, 1], [8, 1], [5, 1], [6, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input {0}/none* --output_prefix {0}/all", "none* matches no shard"),
        ("--input {0}/a {0}/a.bin --output_prefix {0}/all", "names {0}/a twice (as {0}/a and"),
        ("--input {0}/list {0}/a --output_prefix {0}/all", "a is in {0}/list and in {0}/a"),
        (
            "--input {0}/b --output_prefix {0}/a",
            "a.dataset.json cannot be written beside {0}/a.bin",
        ),
        ("--input {0}/a --output_prefix {0}/list --copy true", "beside {0}/list.dataset.json"),
        ("--input {0}/empty --output_prefix {0}/all", "empty holds no token"),
        ("--output_prefix {0}/all --copy true", "copy is true, but input is empty"),
        ("--output_prefix {0}/all", "there is no shard {0}/all_00000_000"),
        ("--output_prefix {0}/all --array_count 0", "array_count is 0"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    a, b = write_shard(tmp_path / "a", [[5, 1]]), write_shard(tmp_path / "b", [[6, 1]])
    write_shard(tmp_path / "empty", [])
    write_dataset(tmp_path / "list", [a, b])
    assert run(*arguments.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "all.dataset.json").exists()


def test_names_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b_2", "b_10", "c[1]", "alone"):
        write_shard(Path(name), [[5, 1]])
    write_dataset("list", ["b_2", "b_10"])
    assert find_datasets(["a.bin", "b_2.idx", "list.dataset.json", "c[1]", "none"]) == [
        "a", "b_2", "list", "c[1]", "none",
    ]  # fmt: skip
    assert find_datasets(["b_*"]) == ["b_2", "b_10"]
    assert find_datasets(["*"]) == ["a", "alone", "c[1]", "list"]  # b_2 and b_10 are in the list
    assert find_datasets(["*.idx"]) == ["a", "alone", "b_2", "b_10", "c[1]"]
    assert find_datasets(["*.dataset.json"]) == ["list"]
    assert [os.path.basename(shard) for shard in find_shards(["list", "a"])] == ["b_2", "b_10", "a"]


def preprocess_tasks(corpus: Path, tokenizer: Path, prefix: Path, tasks: list[int]) -> None:
    from megatron_dlm.data.preprocessing.preprocess import preprocess

    for task in tasks:
        preprocess(
            PreprocessConfig(
                [str(corpus)], str(prefix), str(tokenizer), validation_fraction=0.2,
                shard_size_bytes=4096, array_index=task, array_count=3, workers=1,
            )
        )  # fmt: skip


def test_array_tasks_of_a_run(
    tmp_path: Path, tiny_corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_corpus.directory / "text.jsonl"
    prefix = tmp_path / "text"
    preprocess_tasks(text, tiny_corpus.tokenizer, prefix, [0, 2])
    capsys.readouterr()
    assert run("--output_prefix", prefix, "--array_count", 3) == 2
    error = capsys.readouterr().err
    assert "are not done: 1, 4" in error
    assert "(in an array of 3: tasks 1, counted from 0)" in error
    assert not (tmp_path / "text.dataset.json").exists()
    preprocess_tasks(text, tiny_corpus.tokenizer, prefix, [1])
    (tmp_path / "text.dataset.json").unlink()
    assert run("--output_prefix", prefix) == 0
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    whole = open_dataset(prefix).num_documents + open_dataset(f"{prefix}_valid").num_documents
    assert whole == len(texts)
