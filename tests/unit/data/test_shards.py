"""Shards are byte-identical to Megatron's, readable both ways, and refused when damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.storage.dataset import write_dataset
from megatron_dlm.data.storage.manifest import HeldOut, Manifest, Origin, Source
from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.data.storage.shards import Shard, shard_dtype
from megatron_dlm.runtime.seals import is_sealed, unsealed

DOCUMENTS = [[5, 6, 7, 2], [8], [], [1, 2, 3, 4, 9, 10, 11], [499, 0]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 500) -> Path:
    with ShardWriter(prefix, vocab_size=vocab_size, mask_id=vocab_size - 2) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.publish()
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
    sums = {
        f"{name}_sha256": hashlib.sha256(
            (tmp_path / "deep" / f"shard.{name}").read_bytes()
        ).hexdigest()
        for name in ("bin", "idx")
    }
    assert is_sealed(manifest)
    assert unsealed(manifest) == {
        **sums,
        "format": 2,
        "vocab_size": 500,
        "tokens": 14,
        "documents": 5,
        "dtype": "uint16",
        "tokenizer_sha256": None,
        "eod_id": None,
        "mask_id": 498,
        "max_token_id": 499,
        "sources": [],
        "text_bytes": None,
        "left_out": {},
        "held_out": None,
        "origin": None,
    }


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(
        vocab_size=5, tokens=0, documents=0, dtype="uint16", tokenizer_sha256="a", eod_id=1,
        mask_id=None, max_token_id=-1, bin_sha256="b", idx_sha256="c",
        sources=[Source("a.jsonl", 3, 9)], text_bytes=6, left_out={"empty_file": 2},
        held_out=HeldOut(0.25, "valid", by="tokens"),
        origin=Origin("d", "e", job=1, num_jobs=3, part=2, is_last=False, resume_at=[0, 9]),
    )  # fmt: skip
    manifest.write(tmp_path / "shard")
    assert Manifest.read(tmp_path / "shard") == manifest
    assert Manifest.read(tmp_path / "none") is None


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
    for broken in ("{", "[" * 100_000 + "]" * 100_000):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"shard\.manifest\.json is not a shard manifest"):
            Shard(prefix)
    path.write_text(json.dumps({**manifest, "dtype": "int16"}))
    with pytest.raises(ValueError, match=r"changed since its manifest: .* as uint16.* as int16"):
        Shard(prefix)
    for damaged in ({"format": 1}, {"origin": [1]}, {"sources": 5}, {"held_out": {"x": 1}}):
        path.write_text(json.dumps({**manifest, **damaged}))
        with pytest.raises(ValueError, match=r"shard\.manifest\.json is not a shard manifest"):
            Shard(prefix)


def overwrite(path: str, offset: int, number: int, kind: str) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(struct.pack(kind, number))


# test_shards' shard: 5 sequences of 4, 1, 0, 7, 2 tokens; 34 + 5 * 4 bytes precede the pointers
POINTERS, BOUNDS = 34 + 5 * 4, 34 + 5 * 12


@pytest.mark.parametrize(
    ("offset", "number"),
    [
        (POINTERS + 8, 1 << 40),  # outside of the file
        (POINTERS + 8, -8),
        (POINTERS + 8, 9),  # between two tokens
        (POINTERS + 8, 24),  # goes backwards
        (BOUNDS + 8, 6),
        (BOUNDS + 8, -2),
        (BOUNDS + 8, 4),
    ],
)
def test_damaged_index_is_named_where_it_is_met(tmp_path: Path, offset: int, number: int) -> None:
    prefix = str(write(tmp_path / "shard"))
    overwrite(f"{prefix}.idx", offset, number, "<q")
    shard = Shard(prefix)
    with pytest.raises(ValueError, match=r"shard\.idx is damaged: what it says of documents"):
        shard.document_spans(np.arange(shard.num_documents))


def test_index_that_does_not_begin_at_the_begin_is_refused(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "shard"))
    overwrite(f"{prefix}.idx", POINTERS, 2, "<q")
    with pytest.raises(ValueError, match="must begin at byte 0"):
        Shard(prefix)


def test_tokens_cut_in_two_are_refused(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "shard"))
    overwrite(f"{prefix}.idx", POINTERS + 32, 23, "<q")
    cut(f"{prefix}.bin", 27)
    with pytest.raises(ValueError, match=r"shard\.bin is not made of whole tokens of 2 bytes: 27"):
        Shard(prefix)


def test_document_of_every_token(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path / "shard"))
    owners = [n for n, document in enumerate(DOCUMENTS) for _ in document]
    assert [shard.document_at(token) for token in range(shard.num_tokens)] == owners


def test_two_writers_of_one_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard", vocab_size=500) as writer:
        writer.add_document(np.array([7]))
        with pytest.raises(
            ValueError, match=r"shard\.bin\.tmp is being written by another process"
        ):
            ShardWriter(tmp_path / "shard", vocab_size=500)
        writer.publish()
    assert Shard(tmp_path / "shard").document(0).tolist() == [7]


def test_waiting_for_the_lock_does_not_empty_what_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer opens the temporary file just before the first one publishes it."""
    first = ShardWriter(tmp_path / "shard", vocab_size=500)
    first.add_document(np.array([7, 8]))
    lock = fcntl.flock

    def publish_then_lock(stream: object, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.publish()
        lock(stream, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", publish_then_lock)
    with ShardWriter(tmp_path / "shard", vocab_size=500):
        assert Shard(tmp_path / "shard").document(0).tolist() == [7, 8]


def test_shard_and_list_of_one_name_are_refused(tmp_path: Path) -> None:
    part = write(tmp_path / "part")
    write_dataset(tmp_path / "text", [part])
    with pytest.raises(ValueError, match=r"text cannot be written beside .*text\.dataset\.json"):
        write(tmp_path / "text")
    with pytest.raises(
        ValueError, match=r"part\.dataset\.json cannot be written beside .*part\.bin"
    ):
        write_dataset(part, [part])
