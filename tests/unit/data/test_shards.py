"""Shards are byte-identical to Megatron's, readable both ways, and refused when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.shards import Shard, ShardWriter, shard_dtype

DOCUMENTS = [[5, 6, 7, 2], [8], [], [1, 2, 3, 4, 9, 10, 11], [499, 0]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 500) -> Path:
    with ShardWriter(prefix, vocab_size=vocab_size, mask_id=vocab_size - 2) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.publish(["a.txt"])
    return prefix


@pytest.mark.parametrize("vocab_size", [500, 65499, 65500, 128256])
def test_identical_to_megatrons_writer_and_read_by_its_reader(
    tmp_path: Path, vocab_size: int
) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset

    ours = write(tmp_path / "ours", vocab_size=vocab_size)
    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    assert dtype == shard_dtype(vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        mine = Path(f"{ours}{suffix}").read_bytes()
        assert mine == Path(tmp_path / f"theirs{suffix}").read_bytes()
    read = indexed_dataset.IndexedDataset(str(ours))
    assert [read[number].tolist() for number in range(len(DOCUMENTS))] == DOCUMENTS


def test_reads_megatrons_shards_with_several_sequences_to_a_document(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset

    path = tmp_path / "sentences"
    builder = indexed_dataset.IndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.add_document(torch.tensor([7, 8]), [1, 1])
    builder.finalize(f"{path}.idx")
    shard = Shard(path)
    assert (shard.num_documents, shard.num_tokens, shard.manifest) == (3, 8, None)
    assert [shard.document(n).tolist() for n in range(3)] == [[1, 2, 3, 4, 5], [6], [7, 8]]


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path / "deep" / "shard"))
    assert [shard.document(number).tolist() for number in range(5)] == DOCUMENTS
    assert shard.tokens(3, 4).tolist() == [2, 8, 1, 2]
    manifest = json.loads((tmp_path / "deep" / "shard.manifest.json").read_text())
    assert manifest == {
        "format": 1,
        "vocab_size": 500,
        "tokens": 14,
        "documents": 5,
        "dtype": "uint16",
        "tokenizer_sha256": None,
        "eod_id": None,
        "mask_id": 498,
        "max_token_id": 499,
        "source": ["a.txt"],
    }


def test_empty_shard(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path / "empty", documents=[]))
    assert (shard.num_documents, shard.num_tokens) == (0, 0)


def test_nothing_appears_without_publish(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard", vocab_size=500) as writer:
        writer.add_document(np.array([1, 2]))
        assert [path.name for path in tmp_path.iterdir()] == ["shard.bin.tmp"]
    assert list(tmp_path.iterdir()) == []


def test_failed_rewrite_keeps_the_old_shard(tmp_path: Path) -> None:
    prefix = write(tmp_path / "shard")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write(prefix, documents=[[1], [500]])
    assert Shard(prefix).num_documents == 5


def test_interruption_between_the_renames_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "shard")
    replace = os.replace

    def stop_at_index(source: object, target: object) -> None:
        if str(target).endswith(".idx"):
            raise OSError("killed")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", stop_at_index)
    with pytest.raises(OSError, match="killed"):
        write(prefix)
    with pytest.raises(ValueError, match="does not exist"):
        Shard(prefix)


@pytest.mark.parametrize(
    ("document", "message"),
    [([500], "token id 500 is outside"), ([-1], "token id -1 is outside"), ([498], "mask id 498")],
)
def test_writer_refuses_ids(tmp_path: Path, document: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "shard", documents=[document])


def cut(path: str, num_bytes: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(num_bytes)


@pytest.mark.parametrize(
    ("suffix", "num_bytes", "message"),
    [
        (".bin", 20, r"shard.bin is truncated: 20 bytes, .*shard.idx announces 28"),
        (".bin", 0, r"shard.bin is truncated: 0 bytes"),
        (".idx", 20, r"shard.idx is truncated: 20 bytes, the header alone takes 34"),
        (".idx", 100, r"shard.idx is truncated: 100 bytes, its header announces 142"),
    ],
)
def test_truncated_files_are_named(
    tmp_path: Path, suffix: str, num_bytes: int, message: str
) -> None:
    prefix = write(tmp_path / "shard")
    cut(f"{prefix}{suffix}", num_bytes)
    with pytest.raises(ValueError, match=message) as caught:
        Shard(prefix)
    assert "\n" not in str(caught.value)
    assert "preprocess" in str(caught.value)


def test_missing_foreign_and_changed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.idx does not exist"):
        Shard(tmp_path / "none")
    (tmp_path / "text.idx").write_bytes(b"x" * 100)
    (tmp_path / "text.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"text\.idx is not a Megatron index"):
        Shard(tmp_path / "text")
    prefix = write(tmp_path / "shard")
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"12")
    with pytest.raises(ValueError, match="longer than its index: 30 bytes"):
        Shard(prefix)


def test_manifest_of_another_shard_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "shard")
    path = tmp_path / "shard.manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "tokens": 15}))
    with pytest.raises(ValueError, match=r"changed since its manifest: 14 tokens.*announces 15"):
        Shard(prefix)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"shard\.manifest\.json is not a shard manifest"):
        Shard(prefix)
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="has format 2"):
        Shard(prefix)
