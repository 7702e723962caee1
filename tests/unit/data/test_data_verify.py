"""Every kind of damage is found and named; sound shards pass; text on both sides is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_shards import (
    EOD,
    MASK,
    origin_of,
    random_documents,
    write_megatron_shard,
    write_shard,
)

from megatron_dlm import cli
from megatron_dlm.data.commands import shard_workers
from megatron_dlm.data.commands.shard_check import Rules, ShardTask, check_shard
from megatron_dlm.data.commands.shared_documents import find_shared
from megatron_dlm.data.storage.dataset import Facts, ShardEntry, open_dataset, write_dataset
from megatron_dlm.data.storage.manifest import Manifest

# starts at token 0, 3, 4, 8: bytes 0, 6, 8, 16
DOCUMENTS = [[5, 6, EOD], [EOD], [7, 8, 9, EOD], [10, EOD]]


def check(prefix: Path | str, **task) -> str | None:
    return check_shard(ShardTask(str(prefix), **task), lambda size_bytes: None).problem


def patch(path: Path | str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def rewrite_manifest(prefix: str, **changes) -> None:
    """A manifest that was wrong from the begin: its checksums are those of the files."""
    manifest = Manifest.read(prefix)
    sums = {
        f"{name}_sha256": hashlib.sha256(Path(f"{prefix}.{name}").read_bytes()).hexdigest()
        for name in ("bin", "idx")
    }
    Manifest(**{**vars(manifest), **sums, **changes}).write(prefix)


@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        (5, 500, "document 2 (from byte 8 of the .bin): at its token 1 is id 500, outside of the"),
        (5, MASK, "document 2 (from byte 8 of the .bin): at its token 1 is id 2, the mask"),
        (2, 9, "document 0 (from byte 0 of the .bin): it ends in id 9, not in the end of document"),
        (9, 9, "document 3 (from byte 16 of the .bin): it ends in id 9"),
        (3, 600, "document 1 (from byte 6 of the .bin): at its token 0 is id 600"),
    ],
)
def test_first_bad_document_is_named(tmp_path: Path, place: int, token: int, message: str) -> None:
    prefix = write_shard(tmp_path / "shard", DOCUMENTS)
    assert check(prefix) is None
    patch(f"{prefix}.bin", 2 * place, struct.pack("<H", token))
    problem = check(prefix)
    assert problem is not None
    assert f"shard {prefix}, {message}" in problem
    assert "its bytes changed after it was written" in problem
    rewrite_manifest(prefix)
    problem = check(prefix)
    assert problem is not None
    assert message in problem
    assert "written like that" in problem


def test_the_first_of_many_blocks(tmp_path: Path) -> None:
    """Longer than a block: the number of the document and its byte are those of the shard."""
    documents = [[7] * 4999 + [EOD]] * 500
    prefix = write_shard(tmp_path / "shard", documents)
    for place in (5000 * 450 + 17, 5000 * 471):
        patch(f"{prefix}.bin", 2 * place, b"\xff\xff")
    problem = check(prefix)
    assert problem is not None
    assert f"document 450 (from byte {2 * 5000 * 450} of the .bin): at its token 17 is" in problem


LENGTHS, POINTERS, BOUNDS = 34, 34 + 4 * 4, 34 + 4 * 12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: patch(f"{p}.bin", 0, b"\6"),
            r"shard\.bin does not have its manifest's checksum",
        ),
        (lambda p: rewrite_manifest(p, idx_sha256="0"), r"shard\.idx does not have its manifest's"),
        (lambda p: rewrite_manifest(p, max_token_id=9), "the largest id is 10, its manifest says"),
        (lambda p: os.truncate(f"{p}.bin", 18), r"shard\.bin is truncated: 18 bytes"),
        (lambda p: os.unlink(f"{p}.bin"), r"shard\.bin does not exist"),
        # documents 1 and 2 begin at sequences 2 and 1
        (lambda p: patch(f"{p}.idx", BOUNDS + 8, b"\2\0\0\0\0\0\0\0\1"), "document 1 begins at"),
        (
            lambda p: patch(f"{p}.idx", LENGTHS + 4, b"\3"),
            r"document 1 \(sequence 1\) has 3 tokens",
        ),
        (lambda p: patch(f"{p}.idx", LENGTHS + 4, b"\xff" * 4), "has -1 tokens from byte 6"),
        (lambda p: patch(f"{p}.idx", POINTERS + 8, b"\4"), r"document 0 \(sequence 0\) has 3 tok"),
    ],
)
def test_other_damage_is_named(tmp_path: Path, damage: Callable[[str], None], message: str) -> None:
    prefix = write_shard(tmp_path / "shard", DOCUMENTS)
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        raise ValueError(check(prefix))


def test_empty_document_where_an_end_is_due(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "shard", [[5, EOD], [], [6, EOD]])
    with pytest.raises(ValueError, match=r"document 1 \(from byte 4 of the .bin\): it is empty"):
        raise ValueError(check(prefix))
    without_end = write_shard(tmp_path / "other", [[5], [], [6]], eod_id=None)
    assert check(without_end) is None


def test_shard_of_megatron(tmp_path: Path) -> None:
    prefix = write_megatron_shard(tmp_path / "shard", [[[3, 4], [5]], [], [[6]]])
    verdict = check_shard(ShardTask(prefix), lambda size_bytes: None)
    assert (verdict.problem, verdict.checked) == (None, ("index",))
    verdict = check_shard(ShardTask(prefix, rules=Rules(7, None, 2)), lambda size_bytes: None)
    assert (verdict.problem, verdict.checked) == (None, ("ids", "index"))
    assert "id 6, outside of the vocabulary of 6" in str(check(prefix, rules=Rules(vocab_size=6)))
    assert "id 5, the mask" in str(check(prefix, rules=Rules(mask_id=5)))
    patch(f"{prefix}.bin", 4, struct.pack("<i", -3))
    assert "at its token 1 is id -3, which is negative" in str(check(prefix))


def test_index_alone(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "shard", DOCUMENTS)
    patch(f"{prefix}.bin", 0, b"\xff\xff")
    read: list[int] = []
    verdict = check_shard(ShardTask(prefix, index_only=True), read.append)
    assert (verdict.problem, verdict.checked) == (None, ("index",))
    assert sum(read) == os.stat(f"{prefix}.idx").st_size


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        ({"tokens": 11}, {}, "tokens is 10, the list says 11"),
        ({"documents": 3}, {}, "documents is 4, the list says 3"),
        ({"bin_bytes": 21}, {}, "bin_bytes is 20, the list says 21"),
        ({"bin_sha256": "0"}, {}, "bin_sha256 is .*, the list says 0"),
        ({}, {"eod_id": None}, "eod_id is 1, the list says None"),
        ({}, {"tokenizer_sha256": "s"}, "tokenizer_sha256 is t, the list says s"),
        ({}, {"recipe_sha256": "r"}, "recipe_sha256 is None, the list says r"),
        ({}, {"origin_sha256": "o"}, "origin_sha256 is None, the list says o"),
    ],
)
def test_shard_that_is_not_the_one_of_the_list(
    tmp_path: Path, change: dict, facts: dict, message: str
) -> None:
    dataset = open_dataset(write_shard(tmp_path / "shard", DOCUMENTS))
    entry, known = dataset.entries[0], dataset.facts
    assert check(entry.prefix, entry=entry, facts=known) is None
    task = {
        "entry": ShardEntry(**{**vars(entry), **change}),
        "facts": Facts(**{**vars(known), **facts}),
    }
    with pytest.raises(ValueError, match=message):
        raise ValueError(check(entry.prefix, **task))


def run(*arguments: object) -> int:
    return cli.main(["data", "verify", *map(str, arguments)])


@pytest.mark.parametrize("name", ["part_00001_000.manifest.json", "part.dataset.json"])
def test_every_changed_word_of_a_manifest_or_a_list_is_noticed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of what nothing else is compared with, such as the name of an input file."""
    parts = [write_shard(tmp_path / f"part_0000{n}_000", DOCUMENTS) for n in range(2)]
    write_dataset(tmp_path / "part", parts)
    path, verify = tmp_path / name, ("--input", tmp_path / "part", "--index_only", "true")
    text = path.read_text()
    assert run(*verify) == 0
    for place in (match.start() for match in re.finditer(r"(?<=[ \"])\w", text)):
        other = "8" if text[place] != "8" else "9"
        path.write_text(text[:place] + other + text[place + 1 :])
        assert run(*verify) == 2, text[place - 20 : place + 20]
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}))
    assert run(*verify) == 0, "older versions wrote none"
    capsys.readouterr()


@pytest.fixture
def text(tmp_path: Path) -> str:
    parts = [write_shard(tmp_path / f"part{n}", random_documents(50, n)) for n in range(5)]
    return write_dataset(tmp_path / "text", parts).prefix


@pytest.mark.parametrize("workers", [1, 2])
def test_command_names_every_damaged_shard(
    tmp_path: Path,
    text: str,
    workers: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_workers, "_BYTES_PER_WORKER", 1)
    report = tmp_path / "new" / "report.json"
    command = ("--input", text, "--workers", workers, "--output", report)
    assert run(*command) == 0
    out = capsys.readouterr().out
    assert "sound" in out
    assert "damaged" not in out
    verdicts = json.loads(report.read_text())["shards"]
    assert [verdict["documents"] for verdict in verdicts] == [50] * 5
    every = ["checksums", "ends", "ids", "index", "list"]
    assert all(verdict["checked"] == every for verdict in verdicts)
    patch(tmp_path / "part1.bin", 0, b"\xff\xff")
    os.unlink(tmp_path / "part3.idx")
    assert run(*command) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith(str(tmp_path / "part"))]
    assert len(lines) == 2
    assert "document 0 (from byte 0 of the .bin): at its token 0 is id 65535" in lines[0]
    assert "part3.idx does not exist" in lines[1]
    assert captured.err.count("\n") == 1
    assert "error: 2 of 5 shards are damaged; the first: shard" in captured.err
    content = json.loads(report.read_text())
    assert content["num_damaged"] == 2
    assert [verdict["problem"] is None for verdict in content["shards"]] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_command_refusals(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--input", tmp_path / "none"), "none.idx does not exist"),
        (("--input", text, "--index_only", "true", "--against", text), "index_only is true"),
        (("--input", text, "--workers", -1), "workers is -1; it must be at least 0"),
        (("--input", text, "--output", tmp_path), "cannot be written; name a file"),
        (("--input", text, text), "twice"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_vocabulary_from_a_tokenizer(
    tmp_path: Path, tiny_corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_megatron_shard(tmp_path / "theirs", [[[9, 399]], [[9, 400]]])
    assert run("--input", prefix, "--tokenizer", tiny_corpus.tokenizer) == 2
    assert (
        "document 1 (from byte 8 of the .bin): at its token 1 is id 400" in capsys.readouterr().err
    )


# Texts of the two sides: "a" twice and "b" are shared, empty documents do not count.
A, B, C, D = [5, 6], [7], [8, 9, 10], [6, 5]
TRAIN = [[*text, EOD] for text in (A, C, [], A, B)]
VALID = [[*text, EOD] for text in (D, [], B, A)]


@pytest.mark.parametrize("workers", [1, 2])
def test_shared_documents(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_workers, "_BYTES_PER_WORKER", 1)
    train = write_dataset(
        tmp_path / "train",
        [write_shard(tmp_path / "t0", TRAIN[:2]), write_shard(tmp_path / "t1", TRAIN[2:])],
    )
    # the same text without end of document, in 32 bits
    bare = [document[:-1] for document in VALID]
    valid = open_dataset(write_shard(tmp_path / "v", bare, eod_id=None, vocab_size=70000))
    shared = find_shared([train], [valid], eod_id=None, workers=workers)
    assert (shared.num_train_documents, shared.num_valid_documents) == (3, 2)
    assert shared.compared_documents == 4 + 3
    assert shared.example == f"document 0 of {tmp_path / 't0'} is document 3 of {tmp_path / 'v'}"
    turned = find_shared([valid], [train], eod_id=None, workers=workers)
    assert (turned.num_train_documents, turned.num_valid_documents) == (2, 3)
    other = open_dataset(write_shard(tmp_path / "o", [[*D, EOD], [*C, 5, EOD], [EOD]]))
    none = find_shared([train], [other], eod_id=None, workers=workers)
    assert (none.num_train_documents, none.num_valid_documents, none.example) == (0, 0, None)


def test_equal_hashes_of_different_texts_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dlm.data.commands import shared_documents

    monkeypatch.setattr(
        shared_documents,
        "document_digests",
        lambda block, eod_id: np.zeros(block.num_documents, dtype=np.uint64),
    )
    one = open_dataset(write_shard(tmp_path / "one", [[5, EOD]]))
    two = open_dataset(write_shard(tmp_path / "two", [[6, EOD]]))
    assert find_shared([one], [two], eod_id=None, workers=1).num_train_documents == 0


def test_command_against(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = write_shard(tmp_path / "train", TRAIN), write_shard(tmp_path / "valid", VALID)
    other = write_shard(tmp_path / "other", [[11, EOD]])
    report = tmp_path / "report.json"
    assert run("--input", train, "--against", other, "--output", report) == 0
    assert "no document of" in capsys.readouterr().out
    assert json.loads(report.read_text())["shared"]["num_train_documents"] == 0
    assert run("--input", train, "--against", other, valid, "--output", report) == 2
    error = capsys.readouterr().err
    assert (
        f"error: 2 documents of {other}, {valid} occur in {train} too, 3 times; the first: "
        in error
    )
    assert json.loads(report.read_text())["shared"]["num_valid_documents"] == 2
    foreign = write_shard(tmp_path / "foreign", VALID, tokenizer_sha256="u")
    assert run("--input", train, "--against", foreign) == 2
    assert "were made by different tokenizers" in capsys.readouterr().err
    mine = [
        write_shard(tmp_path / name, documents, origin=origin_of("text", name))
        for name, documents in (("m0", TRAIN), ("m1", [[12, EOD]]))
    ]
    assert run("--input", mine[0], "--against", mine[1]) == 2
    assert "m0 and" in (error := capsys.readouterr().err)
    assert "overlap: both hold the same input files" in error
