"""The tokenizer loses nothing, never gives special ids for text, and is written whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer, normalize
from megatron_dlm.data.tokenizer_training import train_tokenizer

SOURCES = [Path(json.__file__), Path(json.__file__).with_name("decoder.py"), Path(pytest.__file__)]
AWKWARD = [
    "<mask> <pad><eod></s> <bos> <unk> <0x0A>",
    "def f(x):\n    if x:\n\treturn  1234 \r\n\n\n        # end   \n",
    " ",
    "\n",
    "   x   ",
    "\t\t",
    "",
    "é ½ ﬁ 漢字 🙂 \u200b \u3000 \x00 \x85 \u2028",
    "space mark \u2581 and \u2581\u2581x",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer") / str(request.param)
    train_tokenizer(
        TokenizerConfig(
            input=[str(path) for path in SOURCES],
            output_dir=str(directory),
            vocab_size=512,
            model_type=request.param,
        )
    )
    return load_tokenizer(directory)


def test_python_source_round_trips(tokenizer: Tokenizer) -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded[0] == tokenizer.encode(texts[0])
    # Learnt, not spelt in bytes.
    assert sum(map(len, encoded)) < sum(map(len, texts)) / 2


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips_without_special_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips_in_normal_form(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalize(text)
    assert not set(ids) & set(tokenizer.special_ids)


def test_equal_letters_are_equal_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_digits_newlines_and_tabs_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("12345")) - len(tokenizer.encode("1")) == 4
    assert len(tokenizer.encode("\n\n\t")) == 3


def test_special_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    marked = [tokenizer.bos_id, tokenizer.mask_id, *ids, tokenizer.eod_id, tokenizer.pad_id]
    assert tokenizer.decode(marked) == "ab"


def test_metadata_matches_the_model(tokenizer: Tokenizer) -> None:
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eod_id, tokenizer.mask_id)
    assert tokenizer.vocab_size == 512
    assert len(set(special)) == 4
    assert set(special) < set(tokenizer.special_ids)
    text = SOURCES[0].read_text(encoding="utf-8") + SOURCES[1].read_text(encoding="utf-8")
    measured = len(text.encode()) / len(tokenizer.encode(text))
    assert tokenizer.metadata.bytes_per_token == pytest.approx(measured, rel=0.15)


def make_config(directory: Path, text: str, **fields: object) -> TokenizerConfig:
    path = directory / "text.txt"
    path.write_text(text, encoding="utf-8")
    values = {"vocab_size": 300, "output_dir": str(directory / "out"), **fields}
    return TokenizerConfig(input=[str(path)], **values)  # type: ignore[arg-type]


TEXT = "".join(f"{n % 97 * 'ab'}{n % 31 * 'c'} {n:b} {n:x} 名{n}\n" for n in range(500))


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
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\)"):
        train_tokenizer(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        train_tokenizer(make_config(tmp_path, TEXT, output_dir=str(tmp_path / "file")))


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    train_tokenizer(make_config(tmp_path, TEXT, vocab_size=310))
    model = tmp_path / "out" / "tokenizer.model"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"tokenizer\.model changed since its metadata\.json"):
        load_tokenizer(tmp_path / "out")
    model.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        load_tokenizer(tmp_path / "out")
    with pytest.raises(ValueError, match="cannot read"):
        load_tokenizer(tmp_path / "gone")


def test_the_model_file_alone_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    """Other software that reads tokenizer.model gets the same ids for text in normal form."""
    text = SOURCES[1].read_text(encoding="utf-8")
    model = tokenizer.processor.serialized_model_proto()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.encode(text) == tokenizer.encode(text)
