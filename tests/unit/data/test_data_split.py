"""The held-out side is a property of the documents alone, and both sides are the whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_shards import (
    EOD,
    all_documents,
    origin_of,
    random_documents,
    write_megatron_shard,
    write_shard,
)

from megatron_dlm import cli
from megatron_dlm.config.data_commands import SplitConfig
from megatron_dlm.data.commands import shard_workers, split_job
from megatron_dlm.data.commands.split import split
from megatron_dlm.data.storage.dataset import open_dataset, refuse_overlap, write_dataset
from megatron_dlm.data.storage.manifest import Manifest

DOCUMENTS = random_documents(600, seed=3, longest=30)


def held_out(document: list[int], fraction: float) -> bool:
    """The rule as it is documented, from scratch."""
    text = document[:-1] if document[-1:] == [EOD] else document
    digest = hashlib.blake2b(np.array(text, dtype="<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def documents_of(prefix: Path | str) -> list[list[int]]:
    return all_documents([entry.prefix for entry in open_dataset(prefix).entries])


def run(inputs: list[str], output: Path, fraction: float, **settings) -> tuple[list, list]:
    split(SplitConfig(inputs, str(output), fraction=fraction, workers=1, **settings))
    return documents_of(output), documents_of(f"{output}_valid")


def test_sides_follow_the_rule_in_order(tmp_path: Path) -> None:
    parts = [write_shard(tmp_path / f"p{n}", DOCUMENTS[n * 200 : (n + 1) * 200]) for n in range(3)]
    write_dataset(tmp_path / "all", parts)
    train, valid = run([str(tmp_path / "all")], tmp_path / "out", 0.1)
    assert valid == [document for document in DOCUMENTS if held_out(document, 0.1)]
    assert train == [document for document in DOCUMENTS if not held_out(document, 0.1)]
    assert 30 < len(valid) < 90


def test_same_documents_however_stored_ordered_or_extended(tmp_path: Path) -> None:
    more = random_documents(300, seed=4)
    whole = write_shard(tmp_path / "whole", DOCUMENTS)
    turned = [write_shard(tmp_path / f"t{n}", DOCUMENTS[::-1][n::3] + more[n::3]) for n in range(3)]
    # 32 bits and no end of document: the same text under a larger vocabulary's storage
    bare = [document[:-1] for document in DOCUMENTS]
    wide = write_shard(tmp_path / "wide", bare, vocab_size=70000, eod_id=None)
    valid = Counter(map(tuple, run([whole], tmp_path / "a", 0.2)[1]))
    grown = Counter(map(tuple, run(turned, tmp_path / "b", 0.2)[1]))
    assert grown - valid == Counter(tuple(d) for d in more if held_out(d, 0.2))
    assert valid <= grown
    widened = Counter((*document, EOD) for document in run([wide], tmp_path / "c", 0.2)[1])
    assert widened == valid


def test_larger_share_holds_the_smaller(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole", DOCUMENTS)
    small, large = (
        Counter(map(tuple, run([whole], tmp_path / f"{share}", share)[1])) for share in (0.1, 0.3)
    )
    assert small <= large
    assert small != large


def test_shards_of_the_chosen_size_with_manifests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = origin_of("text", "recipe")
    inputs = [
        write_shard(tmp_path / f"p{n}", DOCUMENTS[n * 60 : (n + 1) * 60], origin=origin)
        for n in range(10)
    ]
    read_blocks = split_job.read_blocks
    monkeypatch.setattr(
        split_job, "read_blocks", lambda shard: read_blocks(shard, block_tokens=100)
    )
    train, valid = run(inputs, tmp_path / "out", 0.1, shard_size_bytes=3000)
    assert sorted(train + valid) == sorted(DOCUMENTS)
    opened = open_dataset(tmp_path / "out")
    assert len(opened.entries) > 3
    for entry in opened.entries:
        assert entry.bin_bytes <= 3000 + 2 * 100
        manifest = Manifest.read(entry.prefix)
        assert manifest is not None
        assert manifest.held_out is not None
        assert manifest.origin is not None
        assert (manifest.held_out.fraction, manifest.held_out.side) == (0.1, "train")
        assert manifest.held_out.by == "tokens"
        assert manifest.origin.sha256 == "text"
    stretches = Counter()
    for entry in opened.entries:
        for source in Manifest.read(entry.prefix).sources:
            stretches[source.file] += source.end - source.begin
    assert stretches == {f"{name}.bin": os.stat(f"{name}.bin").st_size for name in inputs}


def test_overlap_is_known_without_reading(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole", DOCUMENTS, origin=origin_of("text", "recipe"))
    run([whole], tmp_path / "out", 0.1)
    run([whole], tmp_path / "other", 0.2)
    opened = {
        name: open_dataset(tmp_path / name) for name in ("whole", "out", "out_valid", "other")
    }
    refuse_overlap([opened["out"]], [opened["out_valid"]])
    for train in ("whole", "other"):
        with pytest.raises(ValueError, match="overlap: both hold the same input files"):
            refuse_overlap([opened[train]], [opened["out_valid"]])
    # a split of the training side is disjoint from what was held out before
    run([str(tmp_path / "out")], tmp_path / "again", 0.3)
    again = [open_dataset(tmp_path / name) for name in ("again", "again_valid")]
    for dataset in again:
        refuse_overlap([dataset], [opened["out_valid"]])
    refuse_overlap(again[:1], again[1:])


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def make_inputs(folder: Path) -> list[str]:
    folder.mkdir()
    return [write_shard(folder / f"p{n}", DOCUMENTS[n * 100 : (n + 1) * 100]) for n in range(6)]


def test_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path / "in")
    split(SplitConfig(inputs, str(tmp_path / "one" / "out"), 0.1, shard_size_bytes=99, workers=1))
    monkeypatch.setattr(shard_workers, "_BYTES_PER_WORKER", 1)
    split(SplitConfig(inputs, str(tmp_path / "two" / "out"), 0.1, shard_size_bytes=99, workers=2))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_stopped_split_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(tmp_path / "in")
    settings = {"fraction": 0.1, "shard_size_bytes": 99, "workers": 1}
    split(SplitConfig(inputs, str(tmp_path / "whole" / "out"), **settings))
    config = SplitConfig(inputs, str(tmp_path / "stopped" / "out"), **settings)
    read_blocks, opened = split_job.read_blocks, []

    def stop_at_the_fourth(shard):
        opened.append(shard.prefix)
        if len(opened) == 4:
            raise OSError(28, "No space left on device")
        return read_blocks(shard)

    monkeypatch.setattr(split_job, "read_blocks", stop_at_the_fourth)
    with pytest.raises(OSError, match="No space left"):
        split(config)
    assert not list((tmp_path / "stopped").glob("*.tmp"))
    assert not list((tmp_path / "stopped").glob("*.dataset.json"))
    split(config)
    assert opened[4:] == inputs[3:]  # what was whole is not read again
    assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")
    split(config)
    assert len(opened) == 7


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["data", "split", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_shard(tmp_path / "whole", DOCUMENTS)
    out = tmp_path / "out"
    assert cli.main(["data", "split", "--input", whole, "--output_prefix", str(out)]) == 0
    assert f"{out}_valid" in capsys.readouterr().out.replace("\n", "")
    before = digest(tmp_path)
    common = ("--input", whole, "--output_prefix")
    assert "with other settings; choose another output_prefix, or give --overwrite true" in refusal(
        capsys, *common, out, "--fraction", 0.2
    )
    assert "whole.dataset.json cannot be written beside" in refusal(capsys, *common, whole)
    one = write_shard(tmp_path / "one", [[5, EOD]])
    write_dataset(tmp_path / "list", [one])
    assert "list.dataset.json lists other shards" in refusal(capsys, *common, tmp_path / "list")
    again = ("--input", out, "--output_prefix", out, "--overwrite", "true")
    assert "out names the input shard" in refusal(capsys, *again)
    assert {name: before[name] for name in before} == {
        name: content for name, content in digest(tmp_path).items() if name in before
    }
    few = refusal(capsys, "--input", one, "--output_prefix", tmp_path / "few")
    assert "no text fell to the valid side: 1 documents are too few for fraction 0.01" in few
    assert not list(tmp_path.glob("few*"))
    assert "fraction is 1.0; it must lie in [0, 1)" in refusal(
        capsys, *common, out, "--fraction", "1.0"
    )
    assert cli.main(["data", "split", *common, str(out), "--fraction=0.2", "--overwrite=true"]) == 0
    assert documents_of(f"{out}_valid") == [d for d in DOCUMENTS if held_out(d, 0.2)]


def test_shards_of_megatron_need_the_tokenizer(
    tmp_path: Path, tiny_corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    eod = json.loads((tiny_corpus.tokenizer / "metadata.json").read_text())["eod_id"]
    texts = [[int(n) for n in row] for row in np.random.default_rng(0).integers(9, 300, (200, 8))]
    documents = [[text[:3], [*text[3:], eod]] for text in texts]
    theirs = write_megatron_shard(tmp_path / "theirs", documents)
    common = ("--input", theirs, "--output_prefix", tmp_path / "out", "--fraction", 0.3)
    assert "theirs has no manifest that tells its vocabulary; give --tokenizer" in refusal(
        capsys, *common
    )
    command = [*map(str, common), "--tokenizer", str(tiny_corpus.tokenizer)]
    assert cli.main(["data", "split", *command]) == 0
    expected = [[*text, eod] for text in texts if held_out(text, 0.3)]
    assert documents_of(tmp_path / "out_valid") == expected
    manifest = Manifest.read(open_dataset(tmp_path / "out").entries[0].prefix)
    assert manifest is not None
    assert (manifest.vocab_size, manifest.dtype, manifest.eod_id) == (400, "uint16", None)
    mine = write_shard(tmp_path / "mine", DOCUMENTS)
    wrong = (
        "--input",
        mine,
        "--output_prefix",
        tmp_path / "x",
        "--tokenizer",
        tiny_corpus.tokenizer,
    )
    assert "is not the one that made the shards" in refusal(capsys, *wrong)
