"""What preprocess refuses, how it says so, and that no dataset looks whole afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mixed_corpus import MixedCorpus, make_mixed_corpus

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.preprocessing.preprocess import preprocess
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.storage.manifest import Manifest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def settings(corpus: MixedCorpus, tmp_path: Path) -> PreprocessConfig:
    """Two plain jobs and the rest."""
    prefix = str(tmp_path / "out" / "text")
    return PreprocessConfig(
        corpus.files, prefix, corpus.tokenizer, workers=1, shard_size_bytes=60_000
    )


def refusal(settings: PreprocessConfig, *parts: object) -> str:
    """The one line that preprocess ends with; every part must be in it."""
    with pytest.raises(ValueError, match=r".") as caught:
        preprocess(settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def lines(path: Path, *records: bytes) -> str:
    path.write_bytes(b"".join(record + b"\n" for record in records))
    return str(path)


def test_text_that_cannot_be_read_stops_with_its_place(
    settings: PreprocessConfig, tmp_path: Path
) -> None:
    bad = lines(tmp_path / "bad.jsonl", b'{"text": "fine"}', b'{"text": ')
    refusal(replace(settings, input=[bad]), "bad.jsonl:2: not valid JSON", "--on_error skip")
    out = tmp_path / "out"
    assert [path.name for path in out.iterdir()] == ["text.recipe.json"]
    with pytest.raises(ValueError, match="does not exist"):
        open_dataset(settings.output_prefix)


def test_a_run_that_stopped_goes_on_without_the_bad_text(
    settings: PreprocessConfig,
    corpus: MixedCorpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was whole before stays; the rest is what a run that skips from the start gives."""
    good = Path(corpus.files[0]).read_bytes().splitlines()
    records = [*good[:250], b'{"text": "\xff"}', b"[]", b'{"txt": 1}', *good[250:]]
    inputs = [lines(tmp_path / "bad.jsonl", *records), *corpus.files[1:]]
    settings = replace(settings, input=inputs, shard_size_bytes=20_000)
    refusal(settings, "bad.jsonl:251: not UTF-8")
    out, prefix = tmp_path / "out", settings.output_prefix
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert len(before) >= 2
    with pytest.raises(ValueError, match="not finished"):
        open_dataset(prefix)
    preprocess(replace(settings, on_error="skip"))
    capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = replace(settings, on_error="skip", output_prefix=str(tmp_path / "other" / "text"))
    preprocess(other)
    output = capsys.readouterr().out
    for reason in ("1 not utf8", "1 not an object", "1 missing text"):
        assert reason in output
    assert files(out) == files(tmp_path / "other")


def test_nothing_kept(settings: PreprocessConfig, tmp_path: Path) -> None:
    short = replace(settings, minimum_characters=1_000_000)
    refusal(short, "no document of at least 1000000 characters", "too short")
    assert list((tmp_path / "out").iterdir()) == []
    refusal(replace(settings, validation_fraction=1e-9), "no document fell to", "text_valid")
    assert not list((tmp_path / "out").glob("*.dataset.json"))


def test_tokenizers(settings: PreprocessConfig, corpus: MixedCorpus, tmp_path: Path) -> None:
    refusal(replace(settings, tokenizer=str(tmp_path)), "cannot read")
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name, content in files(Path(corpus.tokenizer)).items():
        (directory / name).write_bytes(content)
    metadata = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps({**metadata, "eod_id": None}))
    without = replace(settings, tokenizer=str(directory))
    refusal(without, directory, "--append_eod false", "--eod_token")
    assert not (tmp_path / "out").exists()
    preprocess(replace(without, append_eod=False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minimum_characters": 5}, "its minimum_characters is 1, now it is 5"),
        ({"append_eod": False}, "its eod_id is 2, now it is None"),
        ({"validation_fraction": 0.5}, "its validation_fraction is 0.0, now it is 0.5"),
        ({"shard_size_bytes": 70_000}, "its shard_size_bytes is 60000, now it is 70000"),
        ({"input": "fewer"}, "its input files have other names or sizes"),
    ],
)
def test_shards_of_another_run(
    settings: PreprocessConfig,
    corpus: MixedCorpus,
    tmp_path: Path,
    change: dict[str, object],
    said: str,
) -> None:
    preprocess(settings)
    before = files(tmp_path / "out")
    if "input" in change:
        change = {"input": corpus.files[1:]}
    other = replace(settings, **change)  # type: ignore[arg-type]
    refusal(other, settings.output_prefix, said, "--overwrite true")
    assert files(tmp_path / "out") == before
    preprocess(replace(other, overwrite=True))
    anew = replace(other, output_prefix=str(tmp_path / "new" / "text"))
    preprocess(anew)
    assert files(tmp_path / "out") == files(tmp_path / "new")


def test_shards_whose_recipe_is_lost(settings: PreprocessConfig, tmp_path: Path) -> None:
    preprocess(settings)
    before = files(tmp_path / "out")
    (tmp_path / "out" / "text.recipe.json").unlink()
    refusal(replace(settings, minimum_characters=2), "text.recipe.json is not there")
    preprocess(settings)
    assert files(tmp_path / "out") == before


def test_a_single_shard_of_that_name(settings: PreprocessConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text.idx").write_bytes(b"of Megatron-LM")
    for overwrite in (False, True):
        refusal(replace(settings, overwrite=overwrite), "text.bin/.idx is there already")
    assert files(tmp_path / "out") == {"text.idx": b"of Megatron-LM"}


def test_overwriting_spares_a_validation_set_of_its_own(
    settings: PreprocessConfig, corpus: MixedCorpus, tmp_path: Path
) -> None:
    own = replace(settings, output_prefix=f"{settings.output_prefix}_valid", input=corpus.files[:1])
    preprocess(own)
    preprocess(settings)
    before = {n: c for n, c in files(tmp_path / "out").items() if n.startswith("text_valid")}
    preprocess(replace(settings, overwrite=True, minimum_characters=2))
    assert before.items() <= files(tmp_path / "out").items()
    held = replace(settings, overwrite=True, validation_fraction=0.1)
    refusal(held, "text_valid is the dataset of another run")


def test_damaged_shards_are_written_again(settings: PreprocessConfig, tmp_path: Path) -> None:
    """Whatever is not whole: a cut file, a missing one, a missing manifest, the other side's."""
    settings = replace(settings, validation_fraction=0.2, shard_size_bytes=30_000)
    preprocess(settings)
    whole = files(tmp_path / "out")
    for name in ("text_00000_000.bin", "text_valid_00001_000.idx", "text_00002_000.manifest.json"):
        path = tmp_path / "out" / name
        path.unlink() if path.suffix == ".json" else path.write_bytes(whole[name][:-2])
    (tmp_path / "out" / "text_valid_00003_000.manifest.json").unlink()
    (tmp_path / "out" / "text_00003_000.bin.tmp").write_bytes(b"of a killed run")
    preprocess(settings)
    assert files(tmp_path / "out") == whole


def test_going_on_behind_any_shard(settings: PreprocessConfig, tmp_path: Path) -> None:
    """Of every format: the reader is set down in the middle of lines, packed lines and rows."""
    settings = replace(settings, shard_size_bytes=12_000, minimum_characters=40)
    preprocess(settings)
    whole = files(tmp_path / "out")
    names = sorted(name for name in whole if name.endswith(".manifest.json"))
    later_parts = [name for name in names if "_000.manifest" not in name]
    sources = "".join(whole[name].decode() for name in later_parts)
    assert all(suffix in sources for suffix in ("gz", "zst", "parquet"))
    for name in later_parts:
        (tmp_path / "out" / name).unlink()
        preprocess(settings)
        assert files(tmp_path / "out") == whole


def test_a_shard_that_another_process_is_writing(
    settings: PreprocessConfig, tmp_path: Path
) -> None:
    from megatron_dlm.data.storage.shard_writer import ShardWriter

    with ShardWriter(f"{settings.output_prefix}_00001_000", vocab_size=400):
        refusal(settings, "text_00001_000.bin.tmp is being written by another process")
    preprocess(settings)
    assert Manifest.read(f"{settings.output_prefix}_00001_000") is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": []}, "input is empty"),
        ({"output_prefix": "out/"}, "must end with the name of the dataset"),
        ({"shard_size_bytes": 0}, "shard_size_bytes is 0"),
        ({"minimum_characters": 0}, "minimum_characters is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"workers": -1}, "workers is -1"),
        ({"array_index": 0}, "give both or none"),
        ({"array_index": 2, "array_count": 2}, "the index must be 0 to count - 1"),
        ({"array_index": 0, "array_count": 2, "overwrite": True}, "remove each other's shards"),
    ],
)
def test_settings(settings: PreprocessConfig, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        replace(settings, **change)  # type: ignore[arg-type]
    assert said in str(caught.value)
