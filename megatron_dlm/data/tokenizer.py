"""Load a SentencePiece tokenizer directory: text to ids and back without loss."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_dlm.config.tokenizer_metadata import TokenizerMetadata, read_tokenizer_metadata

MODEL_FILE = "tokenizer.model"
# SentencePiece writes spaces as this character and would read it back as one.
_SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class Tokenizer:
    """Ids of text. `decode(encode(text))` is the text in Unicode normal form C, blank for blank.

    The special ids never come out of `encode`, whatever the text says.
    """

    metadata: TokenizerMetadata
    processor: Any
    """The SentencePieceProcessor."""

    @property
    def vocab_size(self) -> int:
        return self.metadata.vocab_size

    @property
    def pad_id(self) -> int:
        return self.metadata.pad_id

    @property
    def bos_id(self) -> int:
        return self.metadata.bos_id

    @property
    def eod_id(self) -> int:
        """End of a document."""
        return self.metadata.eod_id

    @property
    def mask_id(self) -> int:
        return self.metadata.mask_id

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        return self.metadata.special_ids

    @property
    def sha256(self) -> str:
        """Hash of the model file; shards carry it."""
        return self.metadata.sha256

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        texts = [normalize(text) for text in texts]
        encoded: list[list[int]] = self.processor.encode(texts, num_threads=_num_cores())
        for place, text in enumerate(texts):
            if _SPACE_MARK in text:
                encoded[place] = self._encode_space_marks(text)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; pad, begin, end-of-document and mask have none."""
        text: str = self.processor.decode([int(token) for token in ids])
        return text

    def _encode_space_marks(self, text: str) -> list[int]:
        """Spell the space mark in bytes (or as an unknown, without byte pieces)."""
        pieces = [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()]
        mark = list(dict.fromkeys(self.processor.piece_to_id(piece) for piece in pieces))
        first, *others = self.processor.encode(text.split(_SPACE_MARK))
        return first + [token for part in others for token in (*mark, *part)]


def normalize(text: str) -> str:
    """Unicode normal form C, so that equal letters are equal tokens; keeps every blank as it is."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Open a directory made by `megatron-dlm tokenizer`."""
    metadata = read_tokenizer_metadata(os.fspath(directory))
    path = Path(directory) / MODEL_FILE
    remedy = "make the tokenizer again with `megatron-dlm tokenizer`"
    if metadata.kind != "sentencepiece":
        raise ValueError(f"tokenizer {directory} is of kind {metadata.kind}, not sentencepiece")
    if not path.is_file():
        raise ValueError(f"tokenizer file {path} does not exist; {remedy}")
    model = path.read_bytes()
    found = hashlib.sha256(model).hexdigest()
    if found != metadata.sha256:
        raise ValueError(
            f"{path} changed since its metadata.json: sha256 {found}, expected {metadata.sha256}; "
            + remedy
        )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.vocab_size() != metadata.vocab_size:
        raise ValueError(
            f"{path} has {processor.vocab_size()} pieces, metadata.json says "
            f"{metadata.vocab_size}; {remedy}"
        )
    return Tokenizer(metadata, processor)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
