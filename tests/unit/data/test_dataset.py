"""A dataset is one shard or a list of them; a list and its shards must agree, and sides differ."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_shards import origin_of, random_documents, write_megatron_shard, write_shard

from megatron_dlm.data.storage import dataset as dataset_module
from megatron_dlm.data.storage.dataset import (
    Dataset,
    describe,
    open_dataset,
    overlap,
    refuse_overlap,
    write_dataset,
)
from megatron_dlm.data.storage.manifest import HeldOut
from megatron_dlm.data.storage.shards import Shard


def write_parts(folder: Path, sizes: tuple[int, ...] = (3, 0, 5, 2), **settings) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_shard(folder / f"part_{place}", random_documents(size, place), **settings)
        for place, size in enumerate(sizes)
    ]


def test_list_holds_the_shards_with_text_in_order(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    written = write_dataset(tmp_path / "text", parts)
    opened = open_dataset(tmp_path / "text")
    assert [os.path.realpath(entry.prefix) for entry in opened.entries] == [
        parts[place] for place in (0, 2, 3)
    ]
    assert (opened.num_documents, opened.facts) == (10, written.facts)
    assert opened.facts.eod_id == 1
    tokens = [Shard(parts[place]).num_tokens for place in (0, 2, 3)]
    np.testing.assert_array_equal(opened.first_tokens, np.cumsum([0, *tokens]))
    np.testing.assert_array_equal(opened.first_documents, [0, 3, 8, 10])
    assert opened.num_tokens == sum(tokens)
    assert opened.shard(1).document(4).tolist() == random_documents(5, 2)[4]


def test_list_moves_with_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    parts = write_parts(Path("parts"))
    write_dataset("text", parts)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert open_dataset(tmp_path / "there" / "text").shard(0).num_documents == 3


def test_one_shard_is_a_dataset(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "shard", random_documents(4))
    opened = open_dataset(prefix)
    assert (opened.num_documents, len(opened.entries)) == (4, 1)
    assert opened.facts.vocab_size == 500
    bare = open_dataset(write_megatron_shard(tmp_path / "theirs", [[[3, 4], [5]]]))
    assert (bare.num_documents, bare.num_tokens, bare.facts.vocab_size) == (1, 3, None)
    assert bare.entries[0].bin_sha256 is None


def test_opening_maps_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "text", write_parts(tmp_path))
    opened: list[str] = []

    class Counted(Shard):
        def __init__(self, prefix: str) -> None:
            opened.append(prefix)
            super().__init__(prefix)

    monkeypatch.setattr(dataset_module, "Shard", Counted)
    dataset = open_dataset(tmp_path / "text")
    assert (dataset.num_documents, dataset.fingerprint() != "", opened) == (10, True, [])
    assert dataset.shard(2) is dataset.shard(2)
    assert [os.path.basename(prefix) for prefix in opened] == ["part_3"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "text", write_parts(tmp_path))
    return tmp_path / "text"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_or_cut_shard_is_named_at_once(text: Path, suffix: str) -> None:
    file = text.with_name(f"part_2{suffix}")
    with file.open("ab") as stream:
        stream.write(b"1234")
    with pytest.raises(ValueError, match=rf"part_2{suffix} has \d+ bytes, .*text.dataset.json ann"):
        open_dataset(text)
    file.unlink()
    with pytest.raises(ValueError, match=rf"part_2{suffix} does not exist, but .* lists it"):
        open_dataset(text)


def test_replaced_shard_of_the_same_size_is_found_when_it_is_opened(text: Path) -> None:
    path = text.with_name("text.dataset.json")
    content = json.loads(path.read_text())
    for counts in (content, content["shards"][1]):
        counts["documents"] += 1
    path.write_text(json.dumps(content))
    dataset = open_dataset(text)
    dataset.shard(0)
    with pytest.raises(ValueError, match=r"part_2 changed since .*5 documents, listed are .* in 6"):
        dataset.shard(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"tokens": 1}, "tokens is 1, its shards have"),
        ({"shards": [{"prefix": "x"}]}, "missing 5 required"),
        ({"facts": None}, "is not a list of shards"),
        ({"shards": 3}, "is not a list of shards"),
    ],
)
def test_damaged_list_is_named(text: Path, change: dict[str, object], message: str) -> None:
    path = text.with_name("text.dataset.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(text)
    assert "data merge --output_prefix" in str(caught.value)


def test_counts_below_zero_are_refused(text: Path) -> None:
    path = text.with_name("text.dataset.json")
    content = json.loads(path.read_text())
    content["shards"][0]["tokens"] = -5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"part_0 has the counts \(-5, 3, "):
        open_dataset(text)


def test_unfinished_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.idx does not exist"):
        open_dataset(tmp_path / "text")
    write_shard(tmp_path / "text_00000_000", random_documents(2))
    with pytest.raises(ValueError, match=r"text is not finished: its shards are there.*data merge"):
        open_dataset(tmp_path / "text")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer_sha256": "other"}, "tokenizer_sha256 is t in .*one and other in .*two"),
        ({"vocab_size": 501}, "vocab_size is 500 in .*one and 501 in .*two"),
        ({"eod_id": None}, "eod_id is 1 in .*one and None in .*two"),
        ({"held_out": HeldOut(0.1, "valid")}, "held_out is None in .*one and .*'valid'"),
    ],
)
def test_shards_that_do_not_fit_together(tmp_path: Path, changed, message: str) -> None:
    one = write_shard(tmp_path / "one", random_documents(2))
    two = write_shard(tmp_path / "two", random_documents(2, 1), **changed)
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "text", [one, two])
    assert not (tmp_path / "text.dataset.json").exists()


def test_facts_of_many_shards(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "one", [[7, 1]], origin=origin_of("a", "r"))
    two = write_shard(tmp_path / "two", [[9, 1]], origin=origin_of("a", "s"))
    three = write_shard(tmp_path / "three", [[8, 1]], origin=origin_of("b", "s"))
    bare = write_megatron_shard(tmp_path / "bare", [[[3]]])
    both = describe([one, two])[1]
    assert (both.max_token_id, both.origin_sha256, both.recipe_sha256) == (9, "a", None)
    assert describe([one, two, three, one])[1].origin_sha256 is None
    assert describe([one, bare])[1].max_token_id is None


def test_fingerprint_is_of_the_text(tmp_path: Path) -> None:
    one, two, three = (write_shard(tmp_path / name, random_documents(3, seed)) for name, seed in
                       (("one", 0), ("two", 1), ("three", 0)))  # fmt: skip
    listed = write_dataset(tmp_path / "text", [one, two])
    assert listed.fingerprint() == write_dataset(tmp_path / "again", [three, two]).fingerprint()
    assert listed.fingerprint() != write_dataset(tmp_path / "turned", [two, one]).fingerprint()
    bare = [write_megatron_shard(tmp_path / f"bare{n}", [[[n]]]) for n in (5, 6)]
    assert len({open_dataset(prefix).fingerprint() for prefix in bare}) == 2


def linked_shards(tmp_path: Path, count: int) -> list[str]:
    """One shard under many names."""
    part = write_shard(tmp_path / "part_0", random_documents(1))
    parts = [part]
    for place in range(1, count):
        parts.append(str(tmp_path / f"part_{place}"))
        for suffix in (".bin", ".idx", ".manifest.json"):
            os.link(f"{part}{suffix}", f"{parts[-1]}{suffix}")
    return parts


@pytest.fixture
def few_files() -> Iterator[None]:
    """Room for 60 files more than are open now, whatever other tests have left open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 60, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_files")
def test_many_shards_fit_below_a_low_soft_limit(tmp_path: Path) -> None:
    """Those of all datasets that are open at once."""
    parts = linked_shards(tmp_path, 400)
    datasets = []
    for name, shards in (("text", parts[:200]), ("code", parts[200:])):
        write_dataset(tmp_path / name, shards)
        datasets.append(open_dataset(tmp_path / name))
    found = [data.shard(place).num_documents for data in datasets for place in range(200)]
    assert found == [1] * 400


def test_too_many_shards_for_the_hard_limit(tmp_path: Path) -> None:
    write_dataset(tmp_path / "text", linked_shards(tmp_path, 200))
    program = (
        "import resource, sys\n"
        "from megatron_dlm.data.storage.dataset import open_dataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "open_dataset(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "text")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    message = "the shards need 656 open files, this process may open 300; raise `ulimit -Hn`"
    assert message in ended.stderr


def test_the_remedy_for_too_many_shards_needs_few_files(tmp_path: Path) -> None:
    """`data merge --copy true`, which the message above names, works below the same limit."""
    write_dataset(tmp_path / "text", linked_shards(tmp_path, 200))
    program = (
        "import resource, sys\n"
        "from megatron_dlm.config.data_commands import MergeConfig\n"
        "from megatron_dlm.data.commands.merge import merge\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "merge(MergeConfig(input=[sys.argv[1]], output_prefix=sys.argv[2], copy=True))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "text"), str(tmp_path / "one")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert open_dataset(tmp_path / "one").num_documents == 200


def side(tmp_path: Path, name: str, seed: int, **settings) -> Dataset:
    return open_dataset(write_shard(tmp_path / name, random_documents(3, seed), **settings))


def test_overlap_by_shard(tmp_path: Path) -> None:
    one, other = side(tmp_path, "one", 0), side(tmp_path, "other", 1)
    refuse_overlap([one], [other])
    os.symlink(tmp_path / "one.bin", tmp_path / "alias.bin")
    with pytest.raises(ValueError, match=r"data\.train .*one and data\.valid .*one overlap: both"):
        refuse_overlap([other, one], [one])
    copied = side(tmp_path, "copied", 0)
    assert overlap(one, copied) == copied.prefix
    bare = open_dataset(write_megatron_shard(tmp_path / "bare", [[[5]]]))
    assert overlap(bare, one) is None
    assert overlap(bare, bare) == bare.prefix


@pytest.mark.parametrize(
    ("train", "valid", "expected"),
    [
        # other text, and text of which nothing is known
        (dict(origin=origin_of("a", "r")), dict(origin=origin_of("b", "s")), False),
        (dict(origin=origin_of("a", "r")), {}, False),
        # the two sides of one split, and sides of two
        (
            dict(origin=origin_of("a", "r"), held_out=HeldOut(0.1, "train")),
            dict(origin=origin_of("a", "r"), held_out=HeldOut(0.1, "valid")),
            False,
        ),
        (
            dict(origin=origin_of("a", "r"), held_out=HeldOut(0.1, "train")),
            dict(origin=origin_of("a", "s"), held_out=HeldOut(0.2, "valid")),
            True,
        ),
        (
            dict(origin=origin_of("a", "r"), held_out=HeldOut(0.1, "train")),
            dict(origin=origin_of("a", "s"), held_out=HeldOut(0.1, "valid", by="tokens")),
            True,
        ),
        # all of the text, and a part of it
        (
            dict(origin=origin_of("a", "r")),
            dict(origin=origin_of("a", "s"), held_out=HeldOut(0.1, "valid")),
            True,
        ),
        # the same text made into other shards, and two different shards of one run
        (dict(origin=origin_of("a", "r")), dict(origin=origin_of("a", "s")), True),
        (dict(origin=origin_of("a", "r")), dict(origin=origin_of("a", "r", job=1)), False),
    ],
)
def test_overlap_by_origin(tmp_path: Path, train, valid, expected: bool) -> None:
    found = overlap(side(tmp_path, "train", 0, **train), side(tmp_path, "valid", 1, **valid))
    assert found == ("the same input files" if expected else None)
