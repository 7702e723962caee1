"""Many texts to one array of ids: by the fast library where it is proved equal to the reference."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, Literal

import numpy as np

from megatron_dlm.data.tokenization.encoder_probes import probe_texts
from megatron_dlm.data.tokenization.native_errors import native_errors
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, reject_surrogates

EncoderKind = Literal["auto", "fast", "reference"]

_FAST_LIBRARY = "gigatoken"
# One text in so many is encoded by the reference too, and the first few of all.
_CHECKED_SHARE = 512
_CHECKED_FIRST = 8
# The fast library remembers every word it has seen, up to 1.5 bytes per character of text whose
# words are all different; opened anew after so many characters, its memory stays below 400 MB.
_OPEN_CHARACTERS = 1 << 28
_Ids = tuple[np.ndarray, np.ndarray]


class Encoder:
    """Ids of texts as arrays; made by `open_encoder`."""

    def __init__(
        self, tokenizer: Tokenizer, fast: Any = None, *, num_threads: int, reason: str | None = None
    ) -> None:
        self._tokenizer, self._fast, self._num_threads = tokenizer, fast, num_threads
        library = tokenizer.model.library if fast is None else _FAST_LIBRARY
        self.name = f"{library} {version(library)}"
        """The library that encodes, with its version."""
        self.reason = reason
        """Why it is not the fast one; None where it is, or where the reference was asked for."""
        self._num_seen = self._num_characters = 0
        self._is_forbidden = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_forbidden[list(tokenizer.special_ids)] = True
        roles = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eod_id, tokenizer.mask_id)
        unknown = tokenizer.model.unknown_id
        if unknown is not None and unknown not in roles:
            self._is_forbidden[unknown] = False

    def encode(self, texts: Sequence[str]) -> _Ids:
        """Flat int32 ids of all texts back to back, and the int64 number of ids of each.

        Raises ValueError for a text that is no Unicode text, when an id is a special one, and when
        the fast library differs from the reference on one of the texts that both encode.
        """
        reject_surrogates(texts)
        if self._fast is None:
            ids, lengths = self._encode_reference(texts)
        else:
            ids, lengths = self._encode_fast(texts)
            self._check_share(texts, ids, lengths)
        if self._is_forbidden[ids].any():
            token = ids[self._is_forbidden[ids]][0]
            raise ValueError(
                f"{self.name} gave text the special id {token} "
                f"({self._tokenizer.model.token_text(int(token))!r}); leave the text out"
            )
        return ids, lengths

    def first_difference(self, texts: Sequence[str]) -> str | None:
        """The first text that the fast library and the reference encode differently."""
        ours = _rows(*self._encode_fast(texts))
        theirs = _rows(*self._encode_reference(texts))
        for text, found, expected in zip(texts, ours, theirs, strict=True):
            if not np.array_equal(found, expected):
                return text
        return None

    def _encode_reference(self, texts: Sequence[str]) -> _Ids:
        encoded = self._tokenizer.model.encode(texts, num_threads=self._num_threads)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        flat = chain.from_iterable(encoded)
        return np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths

    def _encode_fast(self, texts: Sequence[str]) -> _Ids:
        import awkward

        model = self._tokenizer.model
        prepared = [model.prepare(text) for text in texts]
        apart = [place for place, text in enumerate(prepared) if model.is_apart(text)]
        for place in apart:
            prepared[place] = ""
        self._num_characters += sum(map(len, prepared))
        if self._num_characters > _OPEN_CHARACTERS:
            self._fast, self._num_characters = model.open_fast(), 0
        rows = self._fast.encode_batch(prepared, parallel=self._num_threads > 1)
        ids = np.asarray(awkward.flatten(rows)).view(np.int32)  # unsigned there; no copy
        lengths = np.asarray(awkward.num(rows))
        if apart:
            ids, lengths = self._with_apart(ids, lengths, texts, apart)
        return ids, lengths

    def _with_apart(
        self, ids: np.ndarray, lengths: np.ndarray, texts: Sequence[str], apart: Sequence[int]
    ) -> _Ids:
        """Put in the ids of the texts that the fast library was not given."""
        theirs, their_lengths = self._encode_reference([texts[place] for place in apart])
        starts = (np.cumsum(lengths) - lengths)[list(apart)]
        ids = np.insert(ids, np.repeat(starts, their_lengths), theirs)
        lengths[list(apart)] = their_lengths
        return ids, lengths

    def _check_share(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        num_first = max(_CHECKED_FIRST - self._num_seen, 0)
        self._num_seen += len(texts)
        places = [
            place for place, text in enumerate(texts) if place < num_first or _is_chosen(text)
        ]
        reference = _rows(*self._encode_reference([texts[place] for place in places]))
        ends = np.cumsum(lengths)
        for place, expected in zip(places, reference, strict=False):
            found = ids[ends[place] - lengths[place] : ends[place]]
            if not np.array_equal(found, expected):
                raise ValueError(
                    f"{self.name} and {self._tokenizer.model.library} give different ids for the "
                    f"text that begins {texts[place][:40]!r}; use the encoder reference"
                )


def open_encoder(tokenizer: Tokenizer, kind: EncoderKind, *, num_threads: int) -> Encoder:
    """The encoder of a tokenizer, proved on texts where libraries differ.

    "reference" is the tokenizer's own library, "fast" is gigatoken, "auto" is the fast one if it
    can open the tokenizer and gives the same ids for all probes, else the reference: a function of
    the tokenizer and the versions of both libraries. Raises ValueError when "fast" cannot be had.
    With one thread no pool of threads is started, so that worker processes may be forked.
    """
    assert num_threads >= 1
    # Both libraries read it when they start their threads, once in a process.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    if kind == "reference":
        return Encoder(tokenizer, num_threads=num_threads)
    try:
        fast = Encoder(tokenizer, tokenizer.model.open_fast(), num_threads=num_threads)
        probes = list(probe_texts(tokenizer.model.delicate_texts()))
        with native_errors(f"{_FAST_LIBRARY} cannot encode"):
            text = fast.first_difference(probes)
    except ValueError as error:
        reason = str(error)
    else:
        if text is None:
            return fast
        reason = f"{_FAST_LIBRARY} gives other ids for {_shortened(text)}"
    if kind == "fast":
        raise ValueError(f"encoder fast: {reason}; use the encoder auto or reference")
    return Encoder(tokenizer, num_threads=num_threads, reason=reason)


def _rows(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Ids of each text; views."""
    return np.split(ids, np.cumsum(lengths)[:-1])


def _is_chosen(text: str) -> bool:
    """A share of all texts that depends on nothing but the text."""
    begin = text[:64].encode("utf-8", "surrogatepass")
    return (len(text) + zlib.crc32(begin)) % _CHECKED_SHARE == 0


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r} ..."
