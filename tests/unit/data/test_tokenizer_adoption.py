"""An adopted tokenizer keeps the ids of text, and its mask is an id that no text gets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from huggingface_tokenizer import library_texts, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

TEXTS = [
    *library_texts("[g-z]*.py", 5),
    "<mask> </s>\n<mask><unused_1> x<mask>y",
    "漢字🙂 é\u0301\ufffd",
    "",
    " ",
]


def sentencepiece_file(directory: Path, **settings: Any) -> Path:
    """A model as others train it: a space before every text, no mask."""
    model = io.BytesIO()
    lines = [line for text in library_texts(num_texts=5) for line in text.split("\n") if line]
    arguments = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **arguments
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "foreign.model").write_bytes(model.getvalue())
    return directory / "foreign.model"


def adopt(existing: Path, output: Path, **fields: Any) -> Tokenizer:
    train_tokenizer(TokenizerConfig(existing=str(existing), output_dir=str(output), **fields))
    return load_tokenizer(output)


@pytest.fixture(scope="module", params=["sentencepiece", "unigram.model", "gpt2", "llama2"])
def existing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("existing")
    if request.param == "sentencepiece":
        return sentencepiece_file(directory)
    if request.param == "unigram.model":
        return sentencepiece_file(directory, model_type="unigram")
    return write_tokenizer(str(request.param), directory / str(request.param))


@pytest.fixture(scope="module")
def adopted(existing: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    output = tmp_path_factory.mktemp("adopted") / "out"
    return adopt(existing, output, add_mask_token=True, vocab_size_divisible_by=64)


def test_text_keeps_its_ids_and_the_mask_comes_after(existing: Path, adopted: Tokenizer) -> None:
    before = load_tokenizer(existing)
    assert before.mask_id is None
    assert adopted.mask_id == before.vocab_size
    assert adopted.vocab_size == -(-(before.vocab_size + 1) // 64) * 64
    assert adopted.special_ids == (
        *before.special_ids,
        *range(before.vocab_size, adopted.vocab_size),
    )
    assert (adopted.eod_id, adopted.bos_id) == (before.eod_id, before.bos_id)
    assert adopted.encode_batch(TEXTS) == before.encode_batch(TEXTS)
    assert adopted.sha256 != before.sha256
    assert adopted.metadata.bytes_per_token is None
    ids = before.encode("some text")
    assert adopted.decode([adopted.mask_id, *ids, adopted.vocab_size - 1]) == before.decode(ids)


@given(parts=st.lists(st.sampled_from(["<mask>", "<", "mask", ">", " ", "<unused_700>", "\n"])))
@settings(max_examples=100, deadline=None)
def test_no_text_gives_the_mask(adopted: Tokenizer, parts: list[str]) -> None:
    ids = adopted.encode("".join(parts))
    assert not set(ids) & set(adopted.special_ids)


def test_other_software_reads_the_adopted_model(existing: Path, tmp_path: Path) -> None:
    adopted = adopt(existing, tmp_path / "out", add_mask_token=True, mask_token="<|m|>")
    text, ids = TEXTS[0], adopted.encode(TEXTS[0])
    assert adopted.mask_id is not None
    if adopted.metadata.kind == "sentencepiece":
        processor = sentencepiece.SentencePieceProcessor(
            model_file=str(tmp_path / "out" / "tokenizer.model")
        )
        assert processor.encode(text) == ids
        assert processor.id_to_piece(adopted.mask_id) == "<|m|>"
        assert processor.is_control(adopted.mask_id)
    else:
        library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.token_to_id("<|m|>") == adopted.mask_id
        config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert config["mask_token"] == "<|m|>"


def test_transformers_knows_the_mask(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    existing = write_tokenizer("gpt2", tmp_path / "gpt2")
    adopted = adopt(existing, tmp_path / "out", add_mask_token=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.mask_token_id == adopted.mask_id
    assert theirs.eos_token_id == adopted.eod_id
    assert theirs(TEXTS[0]).input_ids == adopted.encode(TEXTS[0])


def test_ours_is_adopted_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXTS))
    train_tokenizer(TokenizerConfig([str(text)], output_dir=str(tmp_path / "a"), vocab_size=400))
    first = load_tokenizer(tmp_path / "a")
    second = adopt(tmp_path / "a", tmp_path / "b", vocab_size_divisible_by=128)
    assert second.metadata.normalization == "NFC"
    assert (second.vocab_size, second.mask_id) == (512, first.mask_id)
    assert second.encode("e\u0301 <mask> \u2581") == first.encode("é <mask> \u2581")
    with pytest.raises(ValueError, match=r"has the mask token <mask> \(id 4\) already; leave out"):
        adopt(tmp_path / "a", tmp_path / "c", add_mask_token=True)
    # In place, and over a tokenizer of the other kind.
    existing = write_tokenizer("llama2", tmp_path / "llama2")
    assert adopt(existing, tmp_path / "a").metadata.kind == "huggingface"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "metadata.json",
        "token_bytes.npy",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = adopt(tmp_path / "a", tmp_path / "a", add_mask_token=True)
    assert again.mask_id == again.vocab_size - 1


def test_nothing_asked_for_changes_no_byte(existing: Path, tmp_path: Path) -> None:
    adopted = adopt(existing, tmp_path / "out")
    assert adopted.metadata == load_tokenizer(existing).metadata
    assert np.array_equal(np.load(tmp_path / "out" / "token_bytes.npy"), adopted.token_bytes())


def test_bytes_per_token_of_the_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existing = write_tokenizer("gpt2", tmp_path / "gpt2")
    texts = {".py": TEXTS[0], ".jsonl": "déjà vu " * 50}
    (tmp_path / "x.py").write_text(texts[".py"])
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": texts[".jsonl"]}) + "\n")
    files = [str(tmp_path / name) for name in ("x.py", "y.jsonl")]
    adopted = adopt(existing, tmp_path / "out", input=files)
    said = " ".join(capsys.readouterr().out.split())
    assert "mask none" in said
    sizes = {kind: len(text.encode()) for kind, text in texts.items()}
    tokens = {kind: len(adopted.encode(text)) for kind, text in texts.items()}
    for kind in texts:
        assert f"bytes per token, {kind} {sizes[kind] / tokens[kind]:.2f}" in said
    average = sum(sizes.values()) / sum(tokens.values())
    assert adopted.metadata.bytes_per_token == pytest.approx(average, abs=1e-4)


def test_the_end_of_a_document_can_be_named(tmp_path: Path) -> None:
    existing = write_tokenizer("bert", tmp_path / "bert")
    assert load_tokenizer(existing).eod_id is None
    adopted = adopt(existing, tmp_path / "out", eod_token="[SEP]")
    assert adopted.eod_id is not None
    assert adopted.model.token_text(adopted.eod_id) == "[SEP]"
    # A text token with the role is text no more; all other text keeps its ids.
    existing = write_tokenizer("gpt2", tmp_path / "gpt2")
    adopted = adopt(existing, tmp_path / "gpt2_out", eod_token="<tool_call>")
    assert adopted.eod_id == adopted.vocab_size - 1
    assert adopted.eod_id in adopted.special_ids
    assert adopted.eod_id not in adopted.encode("<tool_call>")
    config = json.loads((tmp_path / "gpt2_out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<tool_call>"
    assert adopted.encode_batch(TEXTS) == load_tokenizer(existing).encode_batch(TEXTS)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {"add_mask_token": True}, r"has the mask token \[MASK\] \(id 4\) already"),
        ("gpt2", {"eod_token": "the"}, r"eod_token the is no special token of .*; it has <tool_"),
        (
            "gpt2",
            {"add_mask_token": True, "mask_token": "<tool_call>"},
            r"<tool_call> is a token already \(id \d+\); choose another name",
        ),
        (
            "llama2",
            {"add_mask_token": True, "mask_token": "s>"},
            r"s> is a token already \(id \d+\); choose another name",
        ),
    ],
)
def test_what_cannot_be_adopted(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    existing = write_tokenizer(kind, tmp_path / kind)
    with pytest.raises(ValueError, match=message):
        adopt(existing, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_a_taken_piece_is_named(tmp_path: Path) -> None:
    existing = sentencepiece_file(tmp_path)
    with pytest.raises(ValueError, match=r"<unk> is a token already \(id 0\)"):
        adopt(existing, tmp_path / "out", add_mask_token=True, mask_token="<unk>")
    with pytest.raises(ValueError, match=r"eod_token e is no special token .*; it has </s>, <s>"):
        adopt(existing, tmp_path / "out", eod_token="e")
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="input holds no text"):
        adopt(existing, tmp_path / "out", input=[str(tmp_path / "none.jsonl")])
    assert not (tmp_path / "out").exists()
