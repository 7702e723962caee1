"""The tokenizer loses nothing, never gives special ids for text, and knows when it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.sentencepiece_model import SentencePieceModel, normalize
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

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
    assert tokenizer.token_bytes()[ids].sum() == len(normalize(text).encode())


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


def test_token_bytes_sum_to_the_text(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert (sizes.dtype, sizes.shape) == (np.int32, (512,))
    assert not sizes[list(tokenizer.special_ids)].any()
    for text in [*(path.read_text(encoding="utf-8") for path in SOURCES), *AWKWARD]:
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_the_model_file_alone_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    """Other software that reads tokenizer.model gets the same ids for text in normal form."""
    text = SOURCES[1].read_text(encoding="utf-8")
    assert isinstance(tokenizer.model, SentencePieceModel)
    model = tokenizer.model.processor.serialized_model_proto()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.encode(text) == tokenizer.encode(text)


@pytest.fixture
def directory(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The files of the tokenizer, to spoil."""
    assert isinstance(tokenizer.model, SentencePieceModel)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model.processor.serialized_model_proto())
    tokenizer.metadata.write(tmp_path)
    return tmp_path


def test_a_damaged_directory_is_refused(directory: Path) -> None:
    assert load_tokenizer(directory).vocab_size == 512
    model = directory / "tokenizer.model"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"tokenizer\.model changed since its metadata\.json"):
        load_tokenizer(directory)
    model.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        load_tokenizer(directory)
    with pytest.raises(ValueError, match=r"cannot read .*make one with .*--existing"):
        load_tokenizer(directory / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "word list"}, r'kind is \'word list\'; it must be "sentencepiece" or "hugg'),
        ({"normalization": "NFKC"}, r'normalization is \'NFKC\'; it must be "NFC" or null'),
        ({"vocab_size": 513}, r"has 512 tokens, metadata\.json says 513; make the tokenizer again"),
        ({"mask_id": "4"}, r"all ids must be integers"),
        ({"eod_id": 99}, r"eod_id is 99; it must be one of special_ids \[0, 1, 2, 3, 4\]"),
    ],
)
def test_a_wrong_card_is_refused(directory: Path, change: dict[str, object], message: str) -> None:
    change_card(directory, change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(directory)


def test_a_card_may_say_nothing(directory: Path) -> None:
    """No mask, not measured; without a normal form the text is encoded as it is."""
    change_card(directory, {"mask_id": None, "pad_id": None, "bytes_per_token": None})
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.eod_id) == (None, None, 2)
    assert tokenizer.metadata.bytes_per_token is None
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    card = json.loads((directory / "metadata.json").read_text())
    del card["normalization"]
    (directory / "metadata.json").write_text(json.dumps(card))
    assert load_tokenizer(directory).encode("e\u0301") != tokenizer.encode("é")


def test_a_bare_model_opens(directory: Path, tokenizer: Tokenizer) -> None:
    (directory / "metadata.json").unlink()
    bare = load_tokenizer(directory)
    assert bare.metadata == load_tokenizer(directory / "tokenizer.model").metadata
    expected = replace(tokenizer.metadata, normalization=None, bytes_per_token=None)
    assert bare.metadata == expected


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cl100k.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(
        ValueError, match=r"cl100k\.tiktoken is not .*convert it to tokenizer\.json"
    ):
        load_tokenizer(tmp_path / "cl100k.tiktoken")
    (tmp_path / "odd.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"odd\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "odd.model")


def change_card(directory: Path, change: dict[str, object]) -> None:
    path = directory / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
