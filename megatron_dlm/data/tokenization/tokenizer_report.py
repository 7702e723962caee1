"""What a new tokenizer is and how well it packs text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.table import Table

from megatron_dlm.data.inputs.byte_streams import CODECS
from megatron_dlm.data.inputs.documents import Document
from megatron_dlm.data.tokenization.encoder import Encoder
from megatron_dlm.data.tokenization.tokenizer import Tokenizer

# Text of each kind of file that is kept to measure on.
_SAMPLE_CHARACTERS = 1_000_000


class MeasuringSample:
    """The first documents of every kind of file (its suffix), up to a million characters each."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        """Kind of file -> texts."""
        self._num_characters: dict[str, int] = {}

    def has_room(self, path: str) -> bool:
        return self._num_characters.get(_kind(path), 0) < _SAMPLE_CHARACTERS

    def add(self, document: Document) -> None:
        kind = _kind(document.origin.path)
        taken = self._num_characters.get(kind, 0)
        text = document.text[: _SAMPLE_CHARACTERS - taken]
        if text:
            self._num_characters[kind] = taken + len(text)
            self.texts.setdefault(kind, []).append(text)


def bytes_per_token(encoder: Encoder, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Kind of file -> UTF-8 bytes per token, and "all" for the kinds together; {} for no text."""
    counts = {}
    for kind, group in texts.items():
        _, lengths = encoder.encode(group)
        counts[kind] = (sum(len(text.encode()) for text in group), int(lengths.sum()))
    if not counts:
        return {}
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    counts = {"all": (totals[0], totals[1]), **counts}
    return {kind: round(size / max(tokens, 1), 4) for kind, (size, tokens) in counts.items()}


def report(tokenizer: Tokenizer, encoder: Encoder, measured: Mapping[str, float]) -> Table:
    """Vocabulary, special tokens, the library that will encode, bytes per token."""
    table = Table(show_header=False, box=None)
    table.add_row("kind", tokenizer.metadata.kind)
    table.add_row("vocabulary", f"{tokenizer.vocab_size:,} tokens")
    roles = {
        "pad": tokenizer.pad_id,
        "begin": tokenizer.bos_id,
        "end of document": tokenizer.eod_id,
        "mask": tokenizer.mask_id,
    }
    for role, token in roles.items():
        name = "none" if token is None else f"{tokenizer.model.token_text(token)} (id {token})"
        table.add_row(role, name)
    table.add_row("special ids", f"{len(tokenizer.special_ids):,}")
    table.add_row("encoder", encoder.name + (f" ({encoder.reason})" if encoder.reason else ""))
    for kind, value in measured.items():
        table.add_row(f"bytes per token, {kind}", f"{value:.2f}")
    return table


def _kind(path: str) -> str:
    """Suffix of a file with that of its compression; its name where it has none."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    packing = suffix if suffix in CODECS else ""
    if packing:
        stem, suffix = os.path.splitext(stem)
    return (suffix or stem) + packing
