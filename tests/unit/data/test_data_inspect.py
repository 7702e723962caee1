"""`data inspect` and `data count` against numbers counted another way."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_shards import EOD, MASK, random_documents, write_megatron_shard, write_shard

from megatron_dlm import cli
from megatron_dlm.data.commands import shard_workers
from megatron_dlm.data.commands.inspection_tables import printable
from megatron_dlm.data.packing import Stride
from megatron_dlm.data.storage.dataset import write_dataset
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer

DOCUMENTS = [*random_documents(200, seed=1, longest=300), [], [7, 8], [9] * 3000]


def inspect(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What the command writes of its datasets."""
    report = tmp_path / "report.json"
    command = ["data", "inspect", *map(str, arguments), "--output", str(report)]
    assert cli.main(command) == 0
    found: dict[str, Any] = json.loads(report.read_text())["datasets"]
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    parts = [
        write_shard(
            tmp_path / f"part{n}", DOCUMENTS[n::3], text_bytes=100, left_out={"too_short": n}
        )
        for n in range(3)
    ]
    return write_dataset(tmp_path / "text", parts).prefix


@pytest.mark.parametrize("workers", [1, 2])
def test_numbers(
    tmp_path: Path,
    text: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shard_workers, "_BYTES_PER_WORKER", 1)
    found = inspect(tmp_path, "--input", text, "--workers", workers)[text]
    lengths = np.array([len(document) for document in DOCUMENTS])
    ids = Counter(token for document in DOCUMENTS for token in document)
    assert (found["shards"], found["documents"]) == (3, len(DOCUMENTS))
    assert (found["tokens"], found["dtypes"]) == (lengths.sum(), {"uint16": 3})
    sizes = (
        os.stat(f"{tmp_path}/part{n}.{end}").st_size for n in range(3) for end in ("bin", "idx")
    )
    assert found["bytes"] == sum(sizes)
    assert found["lengths"]["mean"] == pytest.approx(lengths.mean())
    assert (found["lengths"]["longest"], found["lengths"]["empty"]) == (3000, 1)
    for share, size in found["lengths"]["quantiles"].items():
        assert size == np.quantile(lengths, float(share), method="inverted_cdf")
    for row in found["lengths"]["histogram"]:
        inside = (lengths >= row["from"]) & (lengths <= row["to"])
        assert (row["documents"], row["tokens"]) == (inside.sum(), lengths[inside].sum())
    assert sum(row["documents"] for row in found["lengths"]["histogram"]) == len(DOCUMENTS)
    assert found["ids"] == {
        "counted_tokens": lengths.sum(),
        "counted_documents": len(DOCUMENTS),
        "smallest": min(ids),
        "largest": max(ids),
        "different": len(ids),
        "vocab_size": 500,
        "outside_vocabulary": 0,
        "first_outside": None,
        "special": {"eod": {"id": EOD, "count": ids[EOD]}, "mask": {"id": MASK, "count": 0}},
        "documents_without_eod": 3,
    }
    assert (found["left_out"], found["text_bytes"]) == ({"too_short": 3}, 300)
    shown = capsys.readouterr().out
    for expected in (
        f"{len(DOCUMENTS):,} (1 empty)",
        f"{lengths.sum():,}",
        "2,048",
        "█",
        "too_short",
    ):
        assert expected in shown


def test_ids_outside_of_the_vocabulary(tmp_path: Path, tiny_corpus) -> None:
    documents = [[[5, 6]], [[7], [8, -4, 400]], [[1_000_000, 399]]]
    theirs = write_megatron_shard(tmp_path / "theirs", documents)
    found = inspect(tmp_path, "--input", theirs)[theirs]["ids"]
    assert (found["smallest"], found["largest"], found["vocab_size"]) == (-4, 1_000_000, None)
    assert (found["outside_vocabulary"], found["documents_without_eod"]) == (None, None)
    tokenizer = ("--tokenizer", tiny_corpus.tokenizer)
    found = inspect(tmp_path, "--input", theirs, *tokenizer)[theirs]["ids"]
    assert (found["vocab_size"], found["outside_vocabulary"]) == (400, 3)
    assert found["first_outside"] == f"id -4 at token 2 of document 1 of {theirs}"
    assert found["different"] == 5
    assert set(found["special"]) == {"eod", "mask", "pad", "bos"}
    assert found["documents_without_eod"] == 3


def test_windows_are_stretches_of_documents(
    tmp_path: Path, tiny_corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tiny_corpus.tokenizer)
    lines = (tiny_corpus.directory / "text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    encoded = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    settings = {"eod_id": tokenizer.eod_id, "mask_id": tokenizer.mask_id, "vocab_size": 400}
    settings["tokenizer_sha256"] = tokenizer.sha256
    shards = [write_shard(tmp_path / f"s{n}", encoded[n::2], **settings) for n in range(2)]
    name = write_dataset(tmp_path / "text", shards).prefix
    command = ("--input", name, "--tokenizer", tiny_corpus.tokenizer, "--window_tokens", 16)
    windows = inspect(tmp_path, *command, "--num_windows", 40)[name]["windows"]
    assert len(windows) == 40
    for window in windows:
        shard = [os.path.realpath(shard) for shard in shards].index(window["shard"])
        document = encoded[shard::2][window["document"]]
        begin = window["offset"]
        assert window["document_tokens"] == len(document)
        assert window["ids"] == document[begin : begin + 16]
        assert len(window["ids"]) == min(16, len(document) - begin)
        assert window["text"] == tokenizer.decode(window["ids"])
    assert {window["shard"] for window in windows} == {os.path.realpath(shard) for shard in shards}
    again = inspect(tmp_path, *command, "--num_windows", 40)[name]["windows"]
    assert again == windows
    assert inspect(tmp_path, *command, "--seed", 5)[name]["windows"] != windows[:3]
    assert "document " in capsys.readouterr().out


def test_a_sample_counts_ids_at_the_begin_of_every_shard(tmp_path: Path) -> None:
    parts = [write_shard(tmp_path / f"p{n}", [[n + 3] * 9 + [EOD]] * 100) for n in range(2)]
    name = write_dataset(tmp_path / "text", parts).prefix
    found = inspect(tmp_path, "--input", name, "--max_tokens", 60)[name]
    assert found["ids"]["counted_tokens"] == 60
    assert (found["ids"]["smallest"], found["ids"]["largest"]) == (EOD, 4)
    assert found["lengths"]["histogram"][-1]["documents"] == 200


def test_nothing_in_a_dataset(tmp_path: Path) -> None:
    empty = write_shard(tmp_path / "empty", [])
    found = inspect(tmp_path, "--input", empty)[empty]
    assert (found["tokens"], found["documents"], found["windows"]) == (0, 0, [])
    hollow = write_shard(tmp_path / "hollow", [[], []], eod_id=None)
    assert inspect(tmp_path, "--input", hollow)[hollow]["lengths"]["empty"] == 2


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\nc\u202e\x00é猫") == "a\\x1b[2J\tb\nc\\u202e\\x00é猫"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect --input {0}/none", "none.idx does not exist"),
        ("inspect --input {0}/text --window_tokens 0", "inspect.window_tokens is 0"),
        ("inspect --input {0}/text --max_tokens 0", "inspect.max_tokens is 0"),
        ("inspect --input {0}/text --num_windows -1", "num_windows is -1"),
        ("inspect --input []", "input is empty; name a dataset"),
        ("inspect --input {0}/text --tokenizer {1}", "did not make the ids of {0}/text: its hash"),
        ("count --input {0}/text --seq_length 0", "seq_length is 0; it must be greater than 0"),
        ("count --input {0}/text {0}/part0 --unique_tokens 9", "but 2 datasets are named"),
        ("count --input {0}/text --unique_tokens 99999999", "but {0}/text holds "),
        ("count", "input is missing"),
    ],
)
@pytest.mark.usefixtures("text")
def test_refusals(
    tmp_path: Path, tiny_corpus, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments.format(tmp_path, tiny_corpus.tokenizer).split()
    assert cli.main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1


def count(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    report = tmp_path / "report.json"
    assert cli.main(["data", "count", *map(str, arguments), "--output", str(report)]) == 0
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def test_counts(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = write_megatron_shard(tmp_path / "theirs", [[[5, 6]], [[7], [8]]])
    found = count(tmp_path, "--input", text, theirs)
    tokens = sum(map(len, DOCUMENTS))
    mine, other = found["datasets"][text], found["datasets"][theirs]
    assert (mine["shards"], mine["documents"], mine["tokens"]) == (3, len(DOCUMENTS), tokens)
    assert (other["shards"], other["documents"], other["tokens"]) == (1, 2, 4)
    assert found["sum"] == {name: mine[name] + other[name] for name in mine}
    assert found["budget"] == {}
    assert f"{tokens + 4:,}" in capsys.readouterr().out


def test_windows_and_epochs(tmp_path: Path, text: str) -> None:
    tokens = sum(map(len, DOCUMENTS))
    lengths = ("--input", text, "--seq_length", 64, "--train_tokens", 5 * tokens)
    assert count(tmp_path, *lengths)["budget"] == {
        "unique_tokens": tokens,
        "windows_per_epoch": Stride(tokens, 64).num_windows,
        "epochs": 5.0,
    }
    assert count(tmp_path, *lengths, "--unique_tokens", 1000)["budget"] == {
        "unique_tokens": 1000,
        "windows_per_epoch": Stride(1000, 64).num_windows,
        "epochs": 5 * tokens / 1000,
    }


def test_counting_reads_no_token(tmp_path: Path, text: str) -> None:
    for n in range(3):
        path = tmp_path / f"part{n}.bin"
        path.chmod(0o000)
        data = path.stat().st_size
        path.unlink()
        with path.open("wb") as stream:
            stream.truncate(data)
    assert count(tmp_path, "--input", text)["sum"]["tokens"] == sum(map(len, DOCUMENTS))
