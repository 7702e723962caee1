"""The fast encoder gives the reference's ids, or is not taken, or stops."""

from __future__ import annotations

import io
import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
import sentencepiece
from huggingface_tokenizer import library_texts, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.encoder import Encoder, open_encoder
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

FAST = ["ours", "gpt2", "qwen", "llama3", "llama2"]
SLOW = ["unigram.model", "bert", "unigram"]
# Marks out of order, of which one is newer than some tables; letters newer than this Python's.
DATED = ["\u0327\U0001183a", "\U000113c2\U000113c2"]


def open_kind(kind: str, directory: Path) -> Tokenizer:
    """A tokenizer of each kind that there is a reason to tell apart."""
    if kind in ("ours", "unigram.model"):
        text = directory / "text.txt"
        text.write_text("".join(library_texts(num_texts=6)))
        config = TokenizerConfig(
            [str(text)],
            output_dir=str(directory / kind),
            vocab_size=600,
            model_type="bpe" if kind == "ours" else "unigram",
        )
        train_tokenizer(config)
    elif kind == "qwen":
        write_tokenizer("gpt2", directory / kind, normalizer={"type": "NFC"})
    else:
        write_tokenizer(kind, directory / kind)
    return load_tokenizer(directory / kind)


@pytest.fixture(scope="module", params=FAST)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return open_kind(str(request.param), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> Encoder:
    return open_encoder(tokenizer, "fast", num_threads=1)


def assert_equal(tokenizer: Tokenizer, encoder: Encoder, texts: list[str]) -> None:
    """The ids of the tokenizer itself, text by text."""
    ids, lengths = encoder.encode(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [token for row in expected for token in row]


def test_real_text_gets_the_same_ids(tokenizer: Tokenizer, fast: Encoder) -> None:
    texts = [text for text in library_texts("*.py", 200) if text]
    assert sum(map(len, texts)) > 4_000_000
    assert_equal(tokenizer, fast, texts)
    assert fast.name == f"gigatoken {version('gigatoken')}"
    assert fast.reason is None
    assert open_encoder(tokenizer, "auto", num_threads=1).name == fast.name


def test_reference_and_threads_agree(tokenizer: Tokenizer, fast: Encoder) -> None:
    texts = [*library_texts("[g-z]*.py", 10), "", "x", ""]
    ids, lengths = fast.encode(texts)
    for kind, num_threads in (("reference", 1), ("reference", 2), ("fast", 2)):
        encoder = open_encoder(tokenizer, kind, num_threads=num_threads)  # type: ignore[arg-type]
        found, found_lengths = encoder.encode(texts)
        assert np.array_equal(ids, found)
        assert np.array_equal(lengths, found_lengths)
    library = tokenizer.model.library
    reference = open_encoder(tokenizer, "reference", num_threads=1)
    assert (reference.name, reference.reason) == (f"{library} {version(library)}", None)


@given(texts=st.lists(st.text(max_size=60), max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_text_gets_the_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder = open_fast_unchecked(tokenizer)
    assert_equal(tokenizer, encoder, texts)


@given(
    parts=st.lists(
        st.sampled_from(
            [
                *("<", "mask", "<mask>", ">", "</s>", "s>", "<|endoftext|>", "<tool_call>", "1"),
                *(" ", "\n", "\r", "\t", "\u00a0", "\u2581", "\u0301", "\u0316", "e", "é", "'s"),
                *("<0x41>", *DATED),
            ]
        ),
        max_size=30,
    )
)
@settings(max_examples=150, deadline=None)
def test_delicate_text_gets_the_same_ids(tokenizer: Tokenizer, parts: list[str]) -> None:
    assert_equal(tokenizer, open_fast_unchecked(tokenizer), ["".join(parts), "\u2581", "a"])


def open_fast_unchecked(tokenizer: Tokenizer) -> Encoder:
    """Without the probes, and past the first texts, which the encoder checks by itself."""
    encoder = Encoder(tokenizer, fast_of(tokenizer), num_threads=1)
    encoder.encode([""] * 8)
    return encoder


FAST_LIBRARIES: dict[str, Any] = {}


def fast_of(tokenizer: Tokenizer) -> Any:
    if tokenizer.sha256 not in FAST_LIBRARIES:
        FAST_LIBRARIES[tokenizer.sha256] = tokenizer.model.open_fast()
    return FAST_LIBRARIES[tokenizer.sha256]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a"], ["\u2581"], ["", "\u2581", "", "b"]])
def test_few_texts(tokenizer: Tokenizer, fast: Encoder, texts: list[str]) -> None:
    assert_equal(tokenizer, fast, texts)


@pytest.mark.parametrize("text", DATED)
def test_texts_that_libraries_compose_differently(text: str, tmp_path: Path) -> None:
    """The danger is real: gigatoken has newer tables of Unicode than tokenizers."""
    tokenizer = open_kind("qwen", tmp_path)
    assert fast_of(tokenizer).encode(text).tolist() != tokenizer.encode(text)
    encoder = open_fast_unchecked(tokenizer)
    assert_equal(tokenizer, encoder, ["before", text, "e\u0301", "after"])


@pytest.mark.parametrize("kind", SLOW)
def test_what_the_fast_library_cannot_read_takes_the_reference(kind: str, tmp_path: Path) -> None:
    tokenizer = open_kind(kind, tmp_path)
    encoder = open_encoder(tokenizer, "auto", num_threads=1)
    library = tokenizer.model.library
    assert encoder.name == f"{library} {version(library)}"
    assert encoder.reason is not None
    assert encoder.reason.startswith("gigatoken cannot open this tokenizer")
    assert_equal(tokenizer, encoder, [*library_texts(num_texts=3), "", *DATED])
    with pytest.raises(
        ValueError, match=r"encoder fast: gigatoken cannot open .*; use the encoder"
    ):
        open_encoder(tokenizer, "fast", num_threads=1)


def test_what_the_fast_library_reads_wrongly_takes_the_reference(tmp_path: Path) -> None:
    """Without its splitting rule gigatoken cuts text as GPT-2 does; the probes notice."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pre_tokenizer = {**byte_level, "trim_offsets": True}
    tokenizer = load_tokenizer(
        write_tokenizer("gpt2", tmp_path / "whole", pre_tokenizer=pre_tokenizer)
    )
    encoder = open_encoder(tokenizer, "auto", num_threads=1)
    assert encoder.name.startswith("tokenizers")
    assert str(encoder.reason).startswith("gigatoken gives other ids for '")
    with pytest.raises(ValueError, match=r"encoder fast: gigatoken gives other ids for "):
        open_encoder(tokenizer, "fast", num_threads=1)


def test_a_control_piece_that_other_pieces_spell(tmp_path: Path) -> None:
    """Pieces of text that put together the name of a control piece do not give it."""
    source = open_kind("ours", tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (tmp_path / "ours" / "tokenizer.model").read_bytes()
    )
    names = {piece.piece for piece in proto.pieces}
    for cut in range(2, len("<mask>")):
        if "<mask>"[:cut] not in names:
            proto.pieces.add(piece="<mask>"[:cut], score=-1.0)
    (tmp_path / "spelt.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path / "spelt.model")
    assert tokenizer.mask_id == source.mask_id
    text = "a <mask> <mask>"
    whole = gigatoken.Tokenizer.from_sentencepiece(tmp_path / "spelt.model")
    assert tokenizer.mask_id in whole.encode(text)  # what the library would do by itself
    encoder = open_encoder(tokenizer, "fast", num_threads=1)
    assert_equal(tokenizer, encoder, [text])
    assert tokenizer.mask_id not in encoder.encode([text])[0]


def test_byte_pieces_that_other_pieces_spell_take_the_reference(tmp_path: Path) -> None:
    open_kind("ours", tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (tmp_path / "ours" / "tokenizer.model").read_bytes()
    )
    names = {piece.piece for piece in proto.pieces}
    for name in ("<0", "<0x", "<0x4", "<0x41"):
        if name not in names:
            proto.pieces.add(piece=name, score=-1.0)
    (tmp_path / "spelt.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path / "spelt.model")
    encoder = open_encoder(tokenizer, "auto", num_threads=1)
    assert str(encoder.reason).startswith("other pieces spell the byte or unused piece '<0x4")
    assert tokenizer.decode(encoder.encode(["<0x41>"])[0].tolist()) == "<0x41>"


def test_the_library_is_opened_anew_before_it_remembers_too_much(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dlm.data.tokenization.encoder._OPEN_CHARACTERS", 1000)
    encoder = Encoder(tokenizer, Forgotten(), num_threads=1)
    with pytest.raises(AssertionError, match="not opened"):
        encoder.encode(["x" * 1000])
    assert_equal(tokenizer, encoder, ["x"])


class Forgotten:
    """A library that must not be asked."""

    def encode_batch(self, texts: list[str], *, parallel: bool) -> None:
        raise AssertionError("not opened anew")


def other_gpt2(directory: Path) -> Any:
    """A fast tokenizer with the ids of two letters exchanged."""
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    spec["added_tokens"] = []
    return gigatoken.Tokenizer.from_json(json.dumps(spec))


def test_a_wrong_id_in_the_first_texts_stops(tmp_path: Path) -> None:
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    encoder = Encoder(load_tokenizer(directory), other_gpt2(directory), num_threads=1)
    encoder.encode(["text without those letters"] * 5)
    with pytest.raises(
        ValueError, match=r"gigatoken .* and tokenizers give different ids for .*'q "
    ):
        encoder.encode(["x", "q z"])


def test_a_share_of_all_texts_is_checked(tmp_path: Path) -> None:
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    encoder = Encoder(load_tokenizer(directory), other_gpt2(directory), num_threads=1)
    encoder.encode([""] * 8)
    texts = [f"q {number}" for number in range(4000)]
    chosen = [text for text in texts if (len(text) + zlib.crc32(text.encode())) % 512 == 0]
    assert 2 <= len(chosen) <= 20
    others = [text for text in texts if text not in chosen]
    encoder.encode(others)
    with pytest.raises(ValueError, match=rf"that begins '{chosen[0]}'; use the encoder reference"):
        encoder.encode([*others[:50], chosen[0]])


def test_a_special_id_never_comes_out(tmp_path: Path) -> None:
    """Even if a library gave one in a text that is not checked."""
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    whole = gigatoken.Tokenizer.from_json((directory / "tokenizer.json").read_text())
    encoder = Encoder(load_tokenizer(directory), whole, num_threads=1)
    encoder.encode([""] * 8)
    with pytest.raises(ValueError, match=r"gave text the special id 0 \('<\|endoftext\|>'\)"):
        encoder.encode(["a<|endoftext|>b"])


def test_unknown_characters_are_no_special_ids(tmp_path: Path) -> None:
    """A model without bytes has one id for all it does not know, and text may give it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts(num_texts=1)[0].split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=200,
        minloglevel=2,
    )
    (tmp_path / "x.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "x.model")
    encoder = open_encoder(tokenizer, "auto", num_threads=1)
    assert tokenizer.model.unknown_id in encoder.encode(["\u6f22"])[0]


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_half_a_character_is_explained(tokenizer: Tokenizer, kind: Any) -> None:
    encoder = open_encoder(tokenizer, kind, num_threads=1)
    with pytest.raises(ValueError, match="holds half a surrogate pair at character 1"):
        encoder.encode(["good", "a\udfff"])


def test_a_long_run_takes_no_time(tokenizer: Tokenizer, fast: Encoder) -> None:
    assert_equal(tokenizer, fast, ["a" * 200_000, " " * 200_000, "\n" * 50_000, "ab1" * 50_000])
