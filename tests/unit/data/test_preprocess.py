"""The dataset holds what encoding each document gives, in order, with the held-out share apart."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from mixed_corpus import MixedCorpus, make_mixed_corpus

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.preprocessing import part_reader
from megatron_dlm.data.preprocessing.preprocess import preprocess
from megatron_dlm.data.preprocessing.shard_job import in_validation
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.storage.manifest import Manifest
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


def config(corpus: MixedCorpus, output: Path, **changes: object) -> PreprocessConfig:
    settings = PreprocessConfig(corpus.files, str(output / "text"), corpus.tokenizer, workers=1)
    return replace(settings, **changes)  # type: ignore[arg-type]


def documents(prefix: Path) -> list[list[int]]:
    dataset = open_dataset(prefix)
    shards = [dataset.shard(place) for place in range(len(dataset.entries))]
    return [shard.document(n).tolist() for shard in shards for n in range(shard.num_documents)]


def manifests(prefix: Path) -> list[Manifest]:
    found = [Manifest.read(entry.prefix) for entry in open_dataset(prefix).entries]
    return [manifest for manifest in found if manifest is not None]


def decoded(corpus: MixedCorpus, prefix: Path) -> list[str]:
    tokenizer = load_tokenizer(corpus.tokenizer)
    return [tokenizer.decode(document) for document in documents(prefix)]


@pytest.mark.parametrize("batch_documents", [7, 4096])
def test_documents_in_order_with_end_of_document(
    corpus: MixedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_documents: int
) -> None:
    monkeypatch.setattr(part_reader, "_BATCH_DOCUMENTS", batch_documents)
    preprocess(config(corpus, tmp_path, shard_size_bytes=20_000))
    tokenizer = load_tokenizer(corpus.tokenizer)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in corpus.texts]
    assert documents(tmp_path / "text") == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_manifests_say_where_the_text_came_from(corpus: MixedCorpus, tmp_path: Path) -> None:
    preprocess(config(corpus, tmp_path, shard_size_bytes=20_000))
    found, tokenizer = manifests(tmp_path / "text"), load_tokenizer(corpus.tokenizer)
    assert sum(m.text_bytes or 0 for m in found) == sum(len(t.encode()) for t in corpus.texts)
    assert {(m.tokenizer_sha256, m.eod_id, m.mask_id) for m in found} == {
        (tokenizer.sha256, tokenizer.eod_id, tokenizer.mask_id)
    }
    stretches: dict[str, list[tuple[int, int]]] = {}
    for source in (source for m in found for source in m.sources):
        stretches.setdefault(source.file, []).append((source.begin, source.end))
    assert list(stretches) == corpus.files
    num_texts = len(corpus.texts)
    quarter = num_texts // 4
    units = [len(json.dumps({"text": text})) + 1 for text in corpus.texts]
    ends = [sum(units[n * quarter : (n + 1) * quarter]) for n in range(3)]
    ends += [num_texts - 1 - 3 * quarter, len(corpus.texts[-1].encode())]
    for file, end in zip(corpus.files, ends, strict=True):
        places = stretches[file]
        assert (places[0][0], places[-1][1]) == (0, end)
        assert all(place[0] < place[1] for place in places)
        if not file.endswith("a.jsonl"):
            assert [begin for begin, _ in places[1:]] == [end for _, end in places[:-1]]
    # A stretch of plain lines is said to begin where it was cut: the line there is not its own.
    assert len(stretches[corpus.files[0]]) > 1


def test_options(corpus: MixedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(config(corpus, tmp_path, append_eod=False, minimum_characters=200))
    kept = [text for text in corpus.texts if len(text) >= 200]
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert documents(tmp_path / "text") == [tokenizer.encode(text) for text in kept]
    (manifest,) = manifests(tmp_path / "text")
    assert manifest.eod_id is None
    num_short = len(corpus.texts) - len(kept)
    assert manifest.left_out == {"too_short": num_short}
    output = capsys.readouterr().out
    assert f"{manifest.tokens:,}" in output
    assert f"{len(kept):,}" in output
    assert f"{num_short:,} too short" in output
    text_bytes = sum(len(text.encode()) for text in kept)
    assert f"{text_bytes / manifest.tokens:.3f}" in output
    assert f'data.train: {{"{tmp_path}/text": 1.0}}' in output


def test_the_held_out_share_is_a_function_of_the_document(
    corpus: MixedCorpus, tmp_path: Path
) -> None:
    preprocess(config(corpus, tmp_path, validation_fraction=0.2, shard_size_bytes=20_000))
    is_held = [in_validation(text, 0.2) for text in corpus.texts]
    normal = [unicodedata.normalize("NFC", text) for text in corpus.texts]
    for name, side in (("text", False), ("text_valid", True)):
        expected = [text for text, held in zip(normal, is_held, strict=True) if held == side]
        assert decoded(corpus, tmp_path / name) == expected
    assert 0.1 < sum(is_held) / len(is_held) < 0.3
    # A larger share holds everything that a smaller one does.
    assert all(in_validation(t, 0.3) for t in corpus.texts if in_validation(t, 0.2))
    for side in ("train", "valid"):
        facts = open_dataset(tmp_path / ("text" if side == "train" else "text_valid")).facts
        assert facts.held_out is not None
        assert (facts.held_out.fraction, facts.held_out.side) == (0.2, side)


def test_text_without_tokens_is_left_out(
    corpus: MixedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer of others may strip blanks; a lone end of document is no text."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=corpus.files[0], model_prefix=str(tmp_path / "strips"), vocab_size=300, eos_id=2
    )
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    model = str(tmp_path / "strips.model")
    preprocess(config(corpus, tmp_path, input=[str(lines)], tokenizer=model))
    (manifest,) = manifests(tmp_path / "text")
    assert (manifest.documents, manifest.left_out) == (2, {"no_tokens": 1})
    assert manifest.text_bytes == 6
    assert all(len(document) > 1 for document in documents(tmp_path / "text"))


def test_a_finished_run_does_nothing_again(
    corpus: MixedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(corpus, tmp_path, shard_size_bytes=20_000, validation_fraction=0.1)
    preprocess(settings)
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("text*_0*")}
    preprocess(settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("text*_0*")} == before
    second = capsys.readouterr().out
    assert "nothing to do" in second
    assert second.splitlines()[:5] == first.splitlines()[:5], "totals count what was done before"


def test_what_preprocess_wrote_is_no_input(corpus: MixedCorpus, tmp_path: Path) -> None:
    for file in corpus.files[:2]:
        (tmp_path / Path(file).name).write_bytes(Path(file).read_bytes())
    settings = config(corpus, tmp_path, input=[str(tmp_path)])
    preprocess(settings)
    preprocess(settings)  # the input is what it was
    with pytest.raises(ValueError, match="only what preprocess wrote"):
        preprocess(replace(settings, input=[f"{tmp_path}/text*.json"]))


def test_start_up_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys\n"
        "import megatron_dlm.data.preprocessing.preprocess\n"
        "import megatron_dlm.data.tokenization.tokenizer_training\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
