"""A SentencePiece model as a tokenizer.json of Hugging Face."""

from __future__ import annotations

import base64
import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_dlm.data.tokenization.sentencepiece_model import SPACE_MARK

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_UNIGRAM, _BPE = 1, 2
# Byte pieces are reached by fallback only, never by a text that spells their names.
_NEVER = -1e9


def tokenizer_json(model: bytes, *, normalization: str | None) -> str:
    """A tokenizer.json that gives a SentencePiece model's ids.

    Raises ValueError for models that are neither BPE nor unigram.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(
            "the SentencePiece model is neither BPE nor unigram; it cannot be exported"
        )
    added = [
        {
            "id": number,
            "content": piece.piece,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": piece.type == _Piece.CONTROL,
        }
        for number, piece in enumerate(proto.pieces)
        if piece.type in (_Piece.CONTROL, _Piece.USER_DEFINED)
    ]
    blank = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    decoders = [blank, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if proto.normalizer_spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto, normalization)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(proto) if kind == _BPE else _unigram(proto),
    }
    return json.dumps(spec, ensure_ascii=False)


def _normalizers(proto: Any, normalization: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"type": "NFC"}] if normalization == "NFC" else []
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        found.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        found.append({"type": "Strip", "strip_left": True, "strip_right": True})
        found.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        found.append({"type": "Prepend", "prepend": SPACE_MARK})
    return [*found, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]


def _bpe(proto: Any) -> dict[str, Any]:
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    text_pieces = {
        piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL
    }
    merges = []
    for merged, score in text_pieces.items():
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in text_pieces and right in text_pieces:
                merges.append((-score, ids[left], ids[right], [left, right]))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": ids,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _unigram(proto: Any) -> dict[str, Any]:
    text = (_Piece.NORMAL, _Piece.USER_DEFINED)
    pieces = [
        [piece.piece, piece.score if piece.type in text else _NEVER] for piece in proto.pieces
    ]
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": pieces,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
    }
