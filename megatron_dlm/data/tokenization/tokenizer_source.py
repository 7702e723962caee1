"""The files of a tokenizer, read from our own directories or as other software leaves them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.config.tokenizer_metadata import (
    METADATA_FILE,
    MODEL_FILES,
    TokenizerMetadata,
    read_tokenizer_metadata,
)
from megatron_dlm.data.tokenization.huggingface_model import parse_tokenizer_json, token_ids
from megatron_dlm.data.tokenization.sentencepiece_model import (
    SentencePieceModel,
    control_pieces,
    special_piece_ids,
)

# They travel with a tokenizer.json: transformers reads them.
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")

# Role -> names that tokenizers give to such a token, for those that do not say.
_USUAL_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
    "eod": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<eod>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}
# Role -> what Hugging Face calls it.
_KEYS = {"pad": "pad_token", "bos": "bos_token", "eod": "eos_token", "mask": "mask_token"}


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer in memory: its card, and its files by name."""

    metadata: TokenizerMetadata
    files: Mapping[str, bytes]
    origin: str
    """Where it came from, for messages."""

    @property
    def model(self) -> bytes:
        """The file that the ids follow from."""
        return self.files[MODEL_FILES[self.metadata.kind]]

    def with_model(self, model: bytes, **changes: Any) -> TokenizerSource:
        """The same with another model file, and changes to the card; the hash follows."""
        metadata = replace(self.metadata, sha256=hashlib.sha256(model).hexdigest(), **changes)
        files = {**self.files, MODEL_FILES[metadata.kind]: model}
        return replace(self, metadata=metadata, files=files)


def read_source(path: Path) -> TokenizerSource:
    """Our directory, a SentencePiece .model, a tokenizer.json or a Hugging Face directory.

    Raises ValueError naming the file for anything else, and for files that changed.
    """
    if path.suffix == ".model" and path.is_file():
        return _sentencepiece_source(path.read_bytes(), str(path))
    if path.suffix == ".json" and path.is_file():
        return _read_hugging_face(path)
    if path.is_file():
        raise ValueError(
            f"tokenizer {path} is not a .model of SentencePiece or a tokenizer.json; a .tiktoken "
            "file holds no rule for splitting text: convert it to tokenizer.json first"
        )
    if not (path / METADATA_FILE).exists():
        inside = (path / MODEL_FILES[kind] for kind in ("huggingface", "sentencepiece"))
        for file in (file for file in inside if file.is_file()):
            return read_source(file)
    return _read_ours(path)


def trained_source(model: bytes, *, mask_token: str) -> TokenizerSource:
    """A SentencePiece model that this package trained: its text is brought to normal form C."""
    source = _sentencepiece_source(model, "the trained model")
    mask_id = control_pieces(model)[mask_token]
    metadata = replace(source.metadata, mask_id=mask_id, normalization="NFC")
    return replace(source, metadata=metadata)


def special_names(source: TokenizerSource) -> dict[str, int]:
    """Name -> id of the tokens that can have a role: control pieces, or added tokens."""
    if source.metadata.kind == "sentencepiece":
        return control_pieces(source.model)
    added = parse_tokenizer_json(source.model)["added_tokens"]
    return {entry["content"]: entry["id"] for entry in added}


def _read_ours(directory: Path) -> TokenizerSource:
    metadata = read_tokenizer_metadata(str(directory))
    path = directory / MODEL_FILES[metadata.kind]
    remedy = "make the tokenizer again with `megatron-dlm tokenizer`"
    if not path.is_file():
        raise ValueError(f"tokenizer file {path} does not exist; {remedy}")
    model = path.read_bytes()
    found = hashlib.sha256(model).hexdigest()
    if found != metadata.sha256:
        raise ValueError(
            f"{path} changed since its metadata.json: sha256 {found}, expected {metadata.sha256}; "
            + remedy
        )
    return TokenizerSource(metadata, {path.name: model, **_config_files(directory)}, str(directory))


def _sentencepiece_source(model: bytes, origin: str) -> TokenizerSource:
    try:
        processor = SentencePieceModel(model, normalization=None).processor
    except ValueError as error:
        raise ValueError(f"{origin} {error}") from None
    names = control_pieces(model)
    given = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eod": processor.eos_id()}
    roles = {
        role: given[role] if given.get(role, -1) >= 0 else _usual(role, names)
        for role in _USUAL_NAMES
    }
    special = special_piece_ids(model)
    metadata = _card("sentencepiece", model, processor.vocab_size(), roles, special)
    return TokenizerSource(metadata, {MODEL_FILES["sentencepiece"]: model}, origin)


def _read_hugging_face(path: Path) -> TokenizerSource:
    model = path.read_bytes()
    try:
        spec = parse_tokenizer_json(model)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    files = _config_files(path.parent)
    named = {}
    for name in reversed([*files]):  # tokenizer_config.json has the last word
        named.update(_named_tokens(path.parent / name, files[name]))
    # A name that is no added token counts as not given: text would hold it.
    names = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    roles = {
        role: names.get(named.get(key, ""), _usual(role, names)) for role, key in _KEYS.items()
    }
    special = {entry["id"] for entry in spec["added_tokens"] if entry.get("special")}
    size = max(token_ids(spec).values()) + 1
    metadata = _card("huggingface", model, size, roles, tuple(special))
    return TokenizerSource(metadata, {MODEL_FILES["huggingface"]: model, **files}, str(path))


def _card(
    kind: str,
    model: bytes,
    vocab_size: int,
    roles: Mapping[str, int | None],
    special: tuple[int, ...],
) -> TokenizerMetadata:
    with_roles = {*special, *(token for token in roles.values() if token is not None)}
    return TokenizerMetadata(
        kind=kind,
        vocab_size=vocab_size,
        special_ids=tuple(sorted(with_roles)),
        sha256=hashlib.sha256(model).hexdigest(),
        bytes_per_token=None,
        pad_id=roles["pad"],
        bos_id=roles["bos"],
        eod_id=roles["eod"],
        mask_id=roles["mask"],
    )


def _usual(role: str, names: Mapping[str, int]) -> int | None:
    return next((names[name] for name in _USUAL_NAMES[role] if name in names), None)


def _config_files(directory: Path) -> dict[str, bytes]:
    paths = (directory / name for name in CONFIG_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _named_tokens(path: Path, content: bytes) -> dict[str, str]:
    """Hugging Face's key -> token, for the keys in the file that name one."""
    try:
        values = parse_json(content)
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; repair it or remove it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; repair it or remove it")
    tokens = {}
    for key in _KEYS.values():
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    return tokens
