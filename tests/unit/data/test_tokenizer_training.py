"""Training a tokenizer: repeatable, explained when it cannot be, published whole or not at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

TEXT = "".join(f"{n % 97 * 'ab'}{n % 31 * 'c'} {n:b} {n:x} 名{n}\n" for n in range(500))


def make_config(directory: Path, text: str, **fields: object) -> TokenizerConfig:
    path = directory / "text.txt"
    path.write_text(text, encoding="utf-8")
    values = {"vocab_size": 300, "output_dir": str(directory / "out"), **fields}
    return TokenizerConfig(input=[str(path)], **values)  # type: ignore[arg-type]


def test_training_is_repeatable_and_sampling_is_seeded(tmp_path: Path) -> None:
    hashes = []
    for seed in (1, 1, 2):
        train_tokenizer(make_config(tmp_path, TEXT, max_sentences=40, vocab_size=310, seed=seed))
        hashes.append(read_tokenizer_metadata(str(tmp_path / "out")).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_sizes_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size 5000 is too large .* at most \d+; lower"):
        train_tokenizer(make_config(tmp_path, "hello world\n" * 50, vocab_size=5000))
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 200)) * 3
    with pytest.raises(ValueError, match=r"vocab_size 280 is too small: .* take \d+; raise"):
        train_tokenizer(make_config(tmp_path, letters, vocab_size=280))
    with pytest.raises(ValueError, match="input holds no text"):
        train_tokenizer(make_config(tmp_path, " \n\n"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    config = make_config(tmp_path, TEXT, vocab_size=310)
    train_tokenizer(config)
    train_tokenizer(config)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\)"):
        train_tokenizer(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        train_tokenizer(make_config(tmp_path, TEXT, output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_unused_ids_fill_the_vocabulary_and_change_nothing(tmp_path: Path, model_type: str) -> None:
    fields = {"vocab_size": 310, "model_type": model_type}
    train_tokenizer(make_config(tmp_path, TEXT, **fields))
    plain = load_tokenizer(tmp_path / "out")
    train_tokenizer(make_config(tmp_path, TEXT, vocab_size_divisible_by=128, **fields))
    padded = load_tokenizer(tmp_path / "out")
    assert (plain.vocab_size, padded.vocab_size) == (310, 384)
    assert padded.special_ids == (*plain.special_ids, *range(310, 384))
    assert padded.mask_id == plain.mask_id
    text = TEXT + " <unused_310> <unused_383> 漢字🙂"
    assert padded.encode(text) == plain.encode(text)
    assert padded.decode([310, *plain.encode(text), 383]) == text
    # The model file says so too, to whoever reads it without our card.
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "out" / "tokenizer.model")
    )
    assert processor.vocab_size() == 384
    assert processor.is_unused(310)
    assert processor.is_control(padded.mask_id)


def test_the_mask_may_have_another_name(tmp_path: Path) -> None:
    train_tokenizer(make_config(tmp_path, TEXT, vocab_size=310, mask_token="<|noise|>"))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.model.token_text(tokenizer.mask_id or 0) == "<|noise|>"
    assert tokenizer.mask_id not in tokenizer.encode("<|noise|>")


def test_packed_corpora_give_the_same_tokenizer(tmp_path: Path) -> None:
    lines = TEXT.splitlines()
    rows = [json.dumps({"body": line}).encode() for line in lines]
    parts = [b"\n".join(rows[start : start + 125]) for start in range(0, 500, 125)]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(parts[0])
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(parts[1]))
    (corpus / "c.jsonl.zst").write_bytes(zstandard.compress(parts[2]))
    pyarrow.parquet.write_table(pyarrow.table({"body": lines[375:]}), corpus / "d.parquet")
    output = tmp_path / "packed"
    config = TokenizerConfig(
        [str(corpus)], output_dir=str(output), vocab_size=310, text_field="body"
    )
    train_tokenizer(config)
    train_tokenizer(make_config(tmp_path, TEXT, vocab_size=310))
    assert load_tokenizer(output).sha256 == load_tokenizer(tmp_path / "out").sha256


def test_the_report_names_what_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text("for x in range(10):\n    print(x)\n" * 300)
    (tmp_path / "bad.jsonl").write_text('{"text": "hello hello"}\n{"text": 3}\n{"te\n')
    files = [str(tmp_path / name) for name in ("code.py", "bad.jsonl")]
    config = TokenizerConfig(
        files, output_dir=str(tmp_path / "out"), vocab_size=290, on_error="skip"
    )
    train_tokenizer(config)
    words = " ".join(capsys.readouterr().out.split())
    assert "vocabulary 290 tokens" in words
    assert "mask <mask> (id 4)" in words
    assert "end of document <eod> (id 2)" in words
    assert "encoder gigatoken 0" in words
    assert "left out: 1 invalid_json, 1 missing_text" in words
    tokenizer = load_tokenizer(tmp_path / "out")
    for kind, text in ((".py", (tmp_path / "code.py").read_text()), (".jsonl", "hello hello")):
        expected = len(text) / len(tokenizer.encode(text))
        assert f"bytes per token, {kind} {expected:.2f}" in words
    assert f"{tokenizer.metadata.bytes_per_token:.2f} bytes per token: {tmp_path}" in words
    table = np.load(tmp_path / "out" / "token_bytes.npy")
    assert np.array_equal(table, tokenizer.token_bytes())


def test_bad_lines_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "hello"}\n{"te\n')
    config = TokenizerConfig([str(tmp_path / "bad.jsonl")], output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*--on_error skip"):
        train_tokenizer(config)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 271}, r"vocab_size is 271; it must be at least 272 \(256 tokens are bytes"),
        ({"vocab_size_divisible_by": 0}, r"vocab_size_divisible_by is 0; .*greater than 0"),
        ({"mask_token": "<eod>"}, r"mask_token is <eod>; .* have other meanings"),
        ({"mask_token": "a b"}, r"mask_token is 'a b'; it must be letters without blanks"),
        ({"mask_token": ""}, r"mask_token is ''"),
        ({"add_mask_token": True}, r"add_mask_token is True without existing"),
        ({"eod_token": "</s>"}, r"eod_token is </s> without existing"),
        ({"existing": "x"}, r"vocab_size is 300, but an existing tokenizer is not trained"),
        ({"existing": "x", "vocab_size": 8192, "seed": 1}, r"seed is 1, but an existing"),
    ],
)
def test_options_that_clash(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, TEXT, **fields)


def test_one_of_training_and_adopting_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="input is empty; name at least one file to learn from, or"
    ):
        TokenizerConfig(output_dir=str(tmp_path))
