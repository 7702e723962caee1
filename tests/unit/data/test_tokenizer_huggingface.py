"""A Hugging Face tokenizer encodes as its library does, and never gives a special id for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from huggingface_tokenizer import KINDS, library_texts, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer

AWKWARD = [
    "<|endoftext|><|im_start|> <|begin_of_text|> <s></s> <unk> [MASK] [SEP] <pad>",
    "</s>",
    "a</s>b <tool_call>x",
    "def f(x):\n    if x:\n\treturn  1234 \r\n\n\n        # end   \n",
    "",
    " ",
    "\n",
    "\u2581",
    "é e\u0301 ½ ﬁ 漢字 🙂 \u200b \u3000 \x00 \x85 \u2028",
]
SOUND = ["gpt2", "llama3", "llama2"]


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(kind, tmp_path_factory.mktemp("tokenizer") / kind)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def library_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    library.encode_special_tokens = True
    return [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]


def test_real_text_gets_the_ids_of_the_library(directory: Path, tokenizer: Tokenizer) -> None:
    texts = library_texts("[g-z]*.py", 12)
    encoded = tokenizer.encode_batch(texts)
    assert encoded == library_ids(directory, texts)
    assert encoded[0] == tokenizer.encode(texts[0])
    assert tokenizer.encode_batch(texts[:3], num_threads=1) == encoded[:3]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_never_gets_special_ids(kind: str, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    special = set(tokenizer.special_ids) - {tokenizer.model.unknown_id}
    assert not set(ids) & special
    if kind in SOUND:
        # Llama 2 reads the space mark as a space.
        assert tokenizer.decode(ids) == text.replace(
            "\u2581", " " if kind == "llama2" else "\u2581"
        )


@pytest.mark.parametrize(("kind", "text"), [("llama2", "</s>"), ("unigram", "x </s>")])
def test_the_library_alone_would_give_special_ids(kind: str, text: str, tmp_path: Path) -> None:
    """The danger is real: merges and whole pieces spell special tokens."""
    directory = write_tokenizer(kind, tmp_path / kind)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eod_id in library_ids(directory, [text])[0]
    assert tokenizer.eod_id not in tokenizer.encode(text)


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips(kind: str, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & (set(tokenizer.special_ids) - {tokenizer.model.unknown_id})
    if kind in SOUND and not (kind == "llama2" and "\u2581" in text):
        assert tokenizer.decode(ids) == text
        num_bytes = tokenizer.token_bytes()[ids].sum()
        # Llama 2 puts a space before every text.
        assert num_bytes == len(text.encode()) + (kind == "llama2" and text != "")


def test_roles_come_from_the_files(kind: str, tokenizer: Tokenizer) -> None:
    found = {
        role: None if token is None else tokenizer.model.token_text(token)
        for role, token in (
            ("pad", tokenizer.pad_id),
            ("bos", tokenizer.bos_id),
            ("eod", tokenizer.eod_id),
            ("mask", tokenizer.mask_id),
        )
    }
    none = dict.fromkeys(("pad", "bos", "eod", "mask"))
    expected = {
        "gpt2": {"bos": "<|endoftext|>", "eod": "<|endoftext|>"},
        "llama3": {"bos": "<|begin_of_text|>", "eod": "<|end_of_text|>"},
        "llama2": {"bos": "<s>", "eod": "</s>"},
        "bert": {"pad": "[PAD]", "mask": "[MASK]"},
        "unigram": {"pad": "<pad>", "eod": "</s>"},
    }
    assert found == {**none, **expected[kind]}
    ids = [token for token in (tokenizer.eod_id, tokenizer.bos_id) if token is not None]
    assert set(ids) <= set(tokenizer.special_ids)
    assert tokenizer.decode([*ids, *tokenizer.encode("ab"), *ids]).strip() == "ab"


def test_tokens_in_between_keep_their_ids(tmp_path: Path) -> None:
    """A text token after a special one: the library would number it anew without that one."""
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    spec = json.loads((directory / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    tokenizer = load_tokenizer(directory)
    assert tokenizer.special_ids == (ids["<|endoftext|>"], ids["<|im_start|>"])
    assert tokenizer.encode("<tool_call>") == [ids["<tool_call>"]]
    assert tokenizer.vocab_size == ids["<tool_call>"] + 1
    assert tokenizer.token_bytes()[ids["<tool_call>"]] == len("<tool_call>")


def test_any_of_the_paths_opens_it(tmp_path: Path) -> None:
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    tokens = {"pad_token": "<|im_start|>", "eos_token": "<|im_start|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
    one, other = load_tokenizer(directory), load_tokenizer(directory / "tokenizer.json")
    assert one.metadata == other.metadata
    # Of two files that name the token, tokenizer_config.json counts.
    assert (one.pad_id, one.eod_id) == (one.special_ids[1], 0)


def test_settings_that_would_change_documents_are_left_out(tmp_path: Path) -> None:
    plain = write_tokenizer("gpt2", tmp_path / "plain")
    spec = json.loads((plain / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    changed = write_tokenizer(
        "gpt2",
        tmp_path / "changed",
        truncation=truncation,
        padding=padding,
        model={**spec["model"], "dropout": 0.9},
    )
    text = library_texts("[g-z]*.py", 1)[0]
    assert load_tokenizer(changed).encode(text) == load_tokenizer(plain).encode(text)


def test_names_that_the_tokenizer_lacks_give_no_role(tmp_path: Path) -> None:
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    # "!" is text: with a role it could no longer be.
    names = {"eos_token": "<|gone|>", "pad_token": "!", "mask_token": {"content": "<|im_start|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eod_id == 0  # <|endoftext|>, by its usual name
    assert (tokenizer.pad_id, tokenizer.mask_id) == (None, tokenizer.special_ids[1])
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory).mask_id is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer\.json is not valid JSON"),
        ("[]", r"tokenizer\.json is not a Hugging Face tokenizer\.json"),
        ('{"model": {"vocab": {}}}', r"has an empty vocabulary"),
        ('{"model": {"type": "Odd", "vocab": {"a": 0}}}', r"is nothing that tokenizers \d.* reads"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_named(tmp_path: Path, content: str) -> None:
    directory = write_tokenizer("gpt2", tmp_path / "gpt2")
    (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .*repair it or remove it"):
        load_tokenizer(directory)


def test_numbers_that_the_library_does_not_keep_are_refused(tmp_path: Path) -> None:
    plain = write_tokenizer("gpt2", tmp_path / "plain")
    added: list[dict[str, Any]] = json.loads((plain / "tokenizer.json").read_text())["added_tokens"]
    added[-1]["id"] += 7
    directory = write_tokenizer("gpt2", tmp_path / "gap", added_tokens=added)
    with pytest.raises(ValueError, match=r"gives the added token '<tool_call>' id 1008, .* 1001"):
        load_tokenizer(directory)


def test_half_a_character_is_explained(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="holds half a surrogate pair at character 2"):
        tokenizer.encode("ab\ud800")


def test_text_without_tokens_is_explained(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"yes": 0}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("yes") == [0]
    with pytest.raises(ValueError, match=r"tokenizers library cannot encode a text \(.*UNK"):
        tokenizer.encode("no")
