"""Text to ids and back by a SentencePiece model, and the few edits that a model file needs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_dlm.data.tokenization.native_errors import native_errors

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
SpecialKind = Literal["control", "unused"]
_KINDS = {"control": _Piece.CONTROL, "unused": _Piece.UNUSED}
_STANDS_FOR_NO_TEXT = (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.UNUSED)

# SentencePiece writes spaces as this character and would read it back as one.
SPACE_MARK = "\u2581"
# A Unicode noncharacter: a piece that begins with it can be put together from no other pieces.
_UNREACHABLE = "\U0010ffff"


class SentencePieceModel:
    """One model file. With `normalization` "NFC" a text round-trips blank for blank.

    The special ids never come out of `encode`: SentencePiece gives control pieces for no text.
    """

    library = "sentencepiece"

    def __init__(self, model: bytes, *, normalization: str | None) -> None:
        """Raises ValueError when the bytes are no SentencePiece model."""
        with native_errors("is not a SentencePiece model"):
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self.processor.vocab_size()
        self.unknown_id: int | None = self.processor.unk_id()
        self._model, self._normalization = model, normalization

    def prepare(self, text: str) -> str:
        """The form of the text that is encoded."""
        return text if self._normalization is None else normalize(text)

    def is_apart(self, text: str) -> bool:
        """Whether a prepared text needs more than the library does."""
        return self._normalization is not None and SPACE_MARK in text

    def encode(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        texts = [self.prepare(text) for text in texts]
        encoded: list[list[int]] = self.processor.encode(texts, num_threads=num_threads)
        for place, text in enumerate(texts):
            if self.is_apart(text):
                encoded[place] = self._encode_space_marks(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control pieces have none."""
        text: str = self.processor.decode([int(token) for token in ids])
        return text

    def token_text(self, token: int) -> str:
        """The piece as it is written in the model."""
        text: str = self.processor.id_to_piece(token)
        return text

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size] UTF-8 bytes that each piece stands for."""
        sizes = [_num_bytes(piece) for piece in _parse(self._model).pieces]
        return np.array(sizes, dtype=np.int32)

    def delicate_texts(self) -> list[str]:
        """Texts that spell pieces with rules of their own, special ones and user-defined ones."""
        kinds = (*_STANDS_FOR_NO_TEXT, _Piece.USER_DEFINED)
        names = [piece.piece for piece in _parse(self._model).pieces if piece.type in kinds]
        return names + [name.replace(SPACE_MARK, " ") for name in names if SPACE_MARK in name]

    def open_fast(self) -> Any:
        """The same model in the gigatoken library; ValueError says why there is none."""
        import gigatoken

        model = _text_pieces_only(self._model)
        with native_errors("gigatoken cannot open this tokenizer"):
            return gigatoken.Tokenizer.from_sentencepiece(model)

    def _encode_space_marks(self, text: str) -> list[int]:
        """Spell the space mark in bytes (or as an unknown, without byte pieces)."""
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        mark = list(dict.fromkeys(self.processor.piece_to_id(piece) for piece in pieces))
        first, *others = self.processor.encode(text.split(SPACE_MARK))
        return first + [token for part in others for token in (*mark, *part)]


def normalize(text: str) -> str:
    """Unicode normal form C, so that equal letters are equal tokens; keeps every blank as it is."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def control_pieces(model: bytes) -> dict[str, int]:
    """Name -> id of the pieces that the model reserves and gives for no text."""
    pieces = _parse(model).pieces
    return {p.piece: place for place, p in enumerate(pieces) if p.type == _Piece.CONTROL}


def special_piece_ids(model: bytes) -> tuple[int, ...]:
    """Ids of the pieces that stand for no text: control, unknown, unused."""
    pieces = _parse(model).pieces
    return tuple(place for place, p in enumerate(pieces) if p.type in _STANDS_FOR_NO_TEXT)


def append_special_pieces(model: bytes, names: Sequence[str], *, kind: SpecialKind) -> bytes:
    """The model with pieces after all others; the ids of text stay. ValueError: a name is taken."""
    proto = _parse(model)
    places = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    # An unused piece that text could spell is taken apart again; the last in rank changes nothing.
    lowest = min(piece.score for piece in proto.pieces) - 1
    for name in names:
        if name in places:
            raise ValueError(f"{name} is a token already (id {places[name]}); choose another name")
        proto.pieces.add(piece=name, score=lowest, type=_KINDS[kind])
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def _parse(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)


def _num_bytes(piece: Any) -> int:
    if piece.type in _STANDS_FOR_NO_TEXT:
        return 0
    return 1 if piece.type == _Piece.BYTE else len(piece.piece.replace(SPACE_MARK, " ").encode())


def _text_pieces_only(model: bytes) -> bytes:
    """The model for a library that would merge letters into a piece of any type.

    Special pieces keep their ids under names that no text spells. Raises ValueError where a name
    must stay and other pieces spell it: SentencePiece takes such a piece apart again.
    """
    proto = _parse(model)
    names = {piece.piece for piece in proto.pieces}
    for piece in proto.pieces:
        if piece.type in (_Piece.BYTE, _Piece.UNUSED) and _is_spelt(piece.piece, names):
            raise ValueError(f"other pieces spell the byte or unused piece {piece.piece!r}")
        if piece.piece.startswith(_UNREACHABLE):
            raise ValueError("a piece of this tokenizer begins with the noncharacter U+10FFFF")
        if piece.type in _STANDS_FOR_NO_TEXT:
            piece.piece = _UNREACHABLE + piece.piece
            if piece.type == _Piece.UNKNOWN:
                proto.trainer_spec.unk_piece = piece.piece
            piece.type = _Piece.UNUSED
    return bytes(proto.SerializeToString())


def _is_spelt(piece: str, names: set[str]) -> bool:
    return any(piece[:cut] in names and piece[cut:] in names for cut in range(1, len(piece)))
