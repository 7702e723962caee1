"""Open a tokenizer: text to ids and back, by SentencePiece or Hugging Face tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dlm.config.tokenizer_metadata import TokenizerMetadata
from megatron_dlm.data.tokenization.huggingface_model import HuggingFaceModel
from megatron_dlm.data.tokenization.sentencepiece_model import SentencePieceModel
from megatron_dlm.data.tokenization.tokenizer_source import TokenizerSource, read_source
from megatron_dlm.runtime.processes import num_cores


@dataclass(frozen=True)
class Tokenizer:
    """Ids of text. The special ids never come out of `encode`, whatever the text says.

    With a tokenizer that `megatron-dlm tokenizer` trained, `decode(encode(text))` is the text in
    Unicode normal form C, blank for blank; an adopted one does what its library does.
    """

    metadata: TokenizerMetadata
    model: SentencePieceModel | HuggingFaceModel

    @property
    def vocab_size(self) -> int:
        return self.metadata.vocab_size

    @property
    def pad_id(self) -> int | None:
        return self.metadata.pad_id

    @property
    def bos_id(self) -> int | None:
        return self.metadata.bos_id

    @property
    def eod_id(self) -> int | None:
        """End of a document."""
        return self.metadata.eod_id

    @property
    def mask_id(self) -> int | None:
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

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode many texts, on all cores unless `num_threads` says otherwise.

        Raises ValueError for a text that UTF-8 cannot hold, and for one that the tokenizer lacks
        tokens for where it has none for the unknown.
        """
        reject_surrogates(texts)
        return self.model.encode(texts, num_threads=num_threads or num_cores())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special ones have none, but the id of the unknown shows as a sign."""
        silent = {*self.special_ids} - {self.model.unknown_id}
        return self.model.decode(token for token in ids if token not in silent)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special ones.

        The sum over the ids of a text is the text's length in bytes, exactly, for tokenizers that
        `megatron-dlm tokenizer` trained with byte_fallback (text in normal form) and for byte-level
        BPE without a normalizer or added space. It is near it otherwise: by the space that other
        models put before a text, what their normalizers change, blanks that they drop (WordPiece),
        and what they know no token for.
        """
        sizes = self.model.token_bytes()
        sizes[list(self.special_ids)] = 0
        return sizes


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Open a directory made by `megatron-dlm tokenizer`, or a tokenizer as others leave it.

    That is a SentencePiece .model, a tokenizer.json, or a directory of Hugging Face. Raises
    ValueError that names the file and the remedy.
    """
    return open_source(read_source(Path(path)))


def open_source(source: TokenizerSource) -> Tokenizer:
    """The tokenizer of files in memory."""
    metadata = source.metadata
    model: SentencePieceModel | HuggingFaceModel
    try:
        if metadata.kind == "sentencepiece":
            model = SentencePieceModel(source.model, normalization=metadata.normalization)
        else:
            model = HuggingFaceModel(source.model, special_ids=metadata.special_ids)
    except ValueError as error:
        raise ValueError(f"{source.origin} {error}") from None
    if model.vocab_size != metadata.vocab_size:
        raise ValueError(
            f"tokenizer {source.origin} has {model.vocab_size} tokens, metadata.json says "
            f"{metadata.vocab_size}; make the tokenizer again with `megatron-dlm tokenizer`"
        )
    return Tokenizer(metadata, model)


def reject_surrogates(texts: Iterable[str]) -> None:
    """ValueError for a text with half a surrogate pair, which UTF-8 cannot hold."""
    for text in texts:
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text that begins {text[:20]!r} holds half a surrogate pair at character "
                f"{error.start}, which is no Unicode text; leave it out"
            ) from None
