"""Text to ids and back by a Hugging Face tokenizer.json, through the tokenizers library."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson
import tokenizers

from megatron_dlm.data.tokenization.native_errors import native_errors

# A Unicode noncharacter: no text spells a token that begins with it.
_UNREACHABLE = "\U0010ffff"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFaceModel:
    """One tokenizer.json. Encodes as its library does, but never gives a special id.

    The library alone would still put special tokens together from letters where the merges allow
    it; here they have names that no text spells.
    """

    library = "tokenizers"

    def __init__(self, tokenizer_json: bytes, *, special_ids: Sequence[int]) -> None:
        """Raises ValueError when the bytes are no tokenizer.json, or number tokens as none is."""
        spec = parse_tokenizer_json(tokenizer_json)
        ids = token_ids(spec)
        self._names = {token: name for name, token in ids.items()}
        self._special = frozenset(special_ids)
        spec = _text_tokens_only(spec, {self._names.get(token) for token in special_ids})
        self._json = orjson.dumps(spec)
        self._composes = b'"NFC"' in orjson.dumps(spec.get("normalizer"))
        with native_errors(f"is nothing that tokenizers {tokenizers.__version__} reads"):
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json.decode())
        self._tokenizer.encode_special_tokens = True
        self._check_numbers(spec["added_tokens"])
        self.vocab_size: int = max(self._names) + 1
        self.unknown_id: int | None = _unknown_id(spec, token_ids(spec))

    def prepare(self, text: str) -> str:
        """The form of the text that is encoded: the library knows of any other."""
        return text

    def is_apart(self, text: str) -> bool:
        """Whether libraries may differ on the text: their tables of Unicode differ in age.

        Text in normal form C by newer tables is left alone by older ones too, but characters that
        this Python's tables lack may combine by newer ones.
        """
        if not self._composes or text.isascii():
            return False
        is_normal = unicodedata.is_normalized("NFC", text)
        return not is_normal or any(unicodedata.category(c) == "Cn" for c in set(text))

    def encode(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
        with native_errors("the tokenizers library cannot encode a text"):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, which hold no special one."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """The token as it is written in tokenizer.json; "" for a number that it leaves out."""
        return self._names.get(token, "")

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size] UTF-8 bytes that each token stands for."""
        spec = orjson.loads(self._json)
        parts = [spec.get("pre_tokenizer"), spec.get("decoder")]
        is_byte_level = b'"ByteLevel"' in orjson.dumps(parts)
        prefix = spec["model"].get("continuing_subword_prefix") or ""
        added = {entry["id"] for entry in spec["added_tokens"]}
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, name in self._names.items():
            if token in self._special:
                continue
            if token in added:
                sizes[token] = len(name.encode())
            elif is_byte_level:  # one letter stands for one byte
                sizes[token] = len(name)
            else:
                sizes[token] = _num_bytes(name.removeprefix(prefix))
        return sizes

    def delicate_texts(self) -> list[str]:
        """Texts that spell special and added tokens."""
        added = orjson.loads(self._json)["added_tokens"]
        others = [entry["content"] for entry in added if not entry["special"]]
        return [self._names[token] for token in sorted(self._special)] + others

    def open_fast(self) -> Any:
        """The same tokenizer in the gigatoken library; ValueError says why there is none."""
        import gigatoken

        spec = orjson.loads(self._json)
        # That library finds special tokens in text, so it gets none.
        spec["added_tokens"] = [entry for entry in spec["added_tokens"] if not entry["special"]]
        with native_errors("gigatoken cannot open this tokenizer"):
            return gigatoken.Tokenizer.from_json(orjson.dumps(spec))

    def _check_numbers(self, added: Sequence[dict[str, Any]]) -> None:
        """The library numbers added tokens by itself; models and shards need the file's numbers."""
        for entry in added:
            found = self._tokenizer.token_to_id(entry["content"])
            if found != entry["id"]:
                name = self._names[entry["id"]]
                raise ValueError(
                    f"gives the added token {name!r} id {entry['id']}, the tokenizers library "
                    f"makes it {found}; save the tokenizer again with that library"
                )


def parse_tokenizer_json(tokenizer_json: bytes) -> dict[str, Any]:
    """The object in the file; ValueError unless it has the parts of a tokenizer."""
    try:
        spec = orjson.loads(tokenizer_json)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error}); name another file") from None
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError("is not a Hugging Face tokenizer.json (it lacks model.vocab)")
    if not model["vocab"]:
        raise ValueError("has an empty vocabulary; name another file")
    spec["added_tokens"] = spec.get("added_tokens") or []
    return spec


def token_ids(spec: dict[str, Any]) -> dict[str, int]:
    """Name -> id of all tokens, the added ones included."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        vocab = {token: place for place, (token, _) in enumerate(vocab)}
    return {**vocab, **{entry["content"]: entry["id"] for entry in spec["added_tokens"]}}


def append_special_tokens(tokenizer_json: bytes, names: Sequence[str]) -> bytes:
    """The tokenizer with special tokens after all others. ValueError: a name is taken."""
    spec = parse_tokenizer_json(tokenizer_json)
    ids = token_ids(spec)
    first = max(ids.values()) + 1
    for token, name in enumerate(names, start=first):
        if name in ids:
            raise ValueError(f"{name} is a token already (id {ids[name]}); choose another name")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": token, "content": name, **flags, "special": True})
    return orjson.dumps(spec)


def _unknown_id(spec: dict[str, Any], ids: dict[str, int]) -> int | None:
    model = spec["model"]
    return model.get("unk_id") if "unk_id" in model else ids.get(model.get("unk_token"))


def _num_bytes(token: str) -> int:
    if _BYTE_TOKEN.fullmatch(token):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _text_tokens_only(spec: dict[str, Any], special: set[str | None]) -> dict[str, Any]:
    """The tokenizer with special tokens out of reach of any text, under their ids."""

    def rename(token: Any) -> Any:
        return _UNREACHABLE + token if token in special else token

    def is_kept(merge: Any) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not {left, right, left + right} & special

    model = {**spec["model"]}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): place for token, place in model["vocab"].items()}
    else:
        model["vocab"] = [[rename(token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if is_kept(merge)]
    if "unk_token" in model:
        model["unk_token"] = rename(model["unk_token"])
    if "dropout" in model:
        model["dropout"] = None  # the same text must always give the same ids
    added = [
        {**entry, "content": rename(entry["content"]), "special": entry["content"] in special}
        for entry in spec["added_tokens"]
    ]
    # Documents are encoded whole, and nothing is put around them.
    whole = {"truncation": None, "padding": None, "post_processor": None}
    return {**spec, **whole, "model": model, "added_tokens": added}
