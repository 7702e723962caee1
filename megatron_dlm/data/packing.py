"""How the unique tokens of a dataset are cut into windows, the samples of training.

Legend: N tokens, S sequence length (`model.seq_length`). A window has S + 1 columns: diffusion
models score the first S, autoregressive models the last S, as targets. One epoch, each window once,
scores every token once in diffusion. What it scores autoregressively is said at each class.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from megatron_dlm.data.document_order import Block, DocumentOrder
from megatron_dlm.data.token_stream import Stretch, TokenReader, TokenStream

_CACHED_BLOCKS = 128


class Sample(NamedTuple):
    """One window."""

    tokens: np.ndarray
    """int64 [S+1]"""
    valid: np.ndarray
    """bool [S+1]: the columns that are scored; the others are context or filler."""
    document: np.ndarray | None
    """int64 [S+1]: 0, 1, 2 … over the documents of the window, filler the last number of its own;
    None where attention may cross documents."""


class Windows(Protocol):
    """The windows of one dataset."""

    @property
    def num_windows(self) -> int: ...

    def read(self, window: int) -> Sample: ...

    def prepare(self) -> None:
        """Read now what would be read at first use."""
        ...


@dataclass(frozen=True)
class Stride:
    """Starts and scored columns of windows at stride S over N tokens.

    Where S does not divide N the last window is moved back to end with the stream and scores only
    what no earlier window did.
    """

    num_tokens: int
    seq_length: int

    def __post_init__(self) -> None:
        assert self.num_tokens > self.seq_length > 0, (self.num_tokens, self.seq_length)

    @property
    def num_windows(self) -> int:
        return -(-self.num_tokens // self.seq_length)

    def start(self, window: int) -> int:
        """First token of the window in the stream; it reads up to S + 1 tokens from there."""
        assert 0 <= window < self.num_windows, window
        return min(window * self.seq_length, self.num_tokens - self.seq_length)

    def valid(self, window: int) -> np.ndarray:
        """bool [S+1]: which columns of the window are scored."""
        columns = self.start(window) + np.arange(self.seq_length + 1)
        valid = columns >= window * self.seq_length
        # The token after the last full window is scored in the moved window, with more context:
        # as a target of both, the autoregressive loss would count it twice.
        last_full = window == self.num_windows - 2 and self.num_tokens % self.seq_length != 0
        valid[-1] = columns[-1] < self.num_tokens and not last_full
        return valid


class StreamWindows:
    """`concat`: windows cut across the documents of the stream, wherever they begin and end.

    Every token but the stream's first is an autoregressive target once an epoch.
    """

    def __init__(
        self, order: DocumentOrder, reader: TokenReader, *, seq_length: int, keep_documents: bool
    ) -> None:
        self._order, self._keep_documents = order, keep_documents
        self._stream = TokenStream(order, reader)
        self._stride = Stride(order.num_tokens, seq_length)

    @property
    def num_windows(self) -> int:
        return self._stride.num_windows

    def prepare(self) -> None:
        self._order.prepare()

    def read(self, window: int) -> Sample:
        columns = self._stride.seq_length + 1
        start = self._stride.start(window)
        tokens, document = self._stream.read(start, min(columns, self._order.num_tokens - start))
        return Sample(
            _filled(tokens, columns, int(tokens[-1])),
            self._stride.valid(window),
            _filled(document, columns, int(document[-1]) + 1) if self._keep_documents else None,
        )


@dataclass(frozen=True)
class _Pieces:
    """Documents of a block, cut where they do not fit into a window; p pieces."""

    documents: np.ndarray
    """int64 [p]: number in the block."""
    offsets: np.ndarray
    """int64 [p]: first token of the piece in its document."""
    lengths: np.ndarray
    """int64 [p]: at most S."""


class DocumentWindows:
    """`document` and `pack`: whole documents, padded at the end of the window.

    A document of more than S tokens is cut into pieces. Each piece after the first begins with the
    last token of the one before as context that is not scored there, so that the first new token is
    predicted from its own document. Autoregressively every token is a target once an epoch, apart
    from the first token of the document that begins a window; column S is never one.

    With `share_windows` pieces share windows by best fit, the longest first (Ding et al. 2024,
    "Fewer Truncations Improve Language Modeling"), within each block of the order.
    """

    def __init__(
        self, order: DocumentOrder, reader: TokenReader, *, seq_length: int, share_windows: bool
    ) -> None:
        assert seq_length > 1, seq_length
        self._order, self._reader = order, reader
        self._seq_length, self._share_windows = seq_length, share_windows
        self._layout = lru_cache(maxsize=_CACHED_BLOCKS)(self._load_layout)

    @property
    def num_windows(self) -> int:
        return int(self._first_windows[-1])

    def prepare(self) -> None:
        self._order.prepare()
        _ = self._first_windows

    @cached_property
    def _first_windows(self) -> np.ndarray:
        """int64 [blocks + 1]: number of the first window of each block, and the end."""
        counts = [len(self._lay_out(block)[1]) for block in self._order.blocks()]
        return np.concatenate([[0], np.cumsum(counts)])

    def _lay_out(self, block: Block) -> tuple[_Pieces, list[list[int]]]:
        """The pieces of a block, and which of them each window holds."""
        pieces = cut_documents(block, self._seq_length)
        if not self._share_windows:
            return pieces, [[piece] for piece in range(len(pieces.lengths))]
        return pieces, best_fit_decreasing(pieces.lengths, self._seq_length)

    def _load_layout(self, number: int) -> tuple[_Pieces, list[list[int]]]:
        return self._lay_out(self._order.block(number))

    def read(self, window: int) -> Sample:
        number = int(np.searchsorted(self._first_windows, window, side="right")) - 1
        block = self._order.block(number)
        pieces, members_of = self._layout(number)
        members = members_of[window - int(self._first_windows[number])]
        documents, offsets = pieces.documents[members], pieces.offsets[members]
        lengths = pieces.lengths[members]
        starts = block.starts[documents] + offsets
        tokens = self._reader.read(
            [
                Stretch(*map(int, stretch))
                for stretch in zip(block.shards[documents], starts, lengths, strict=True)
            ]
        )
        columns = self._seq_length + 1
        valid = np.arange(columns) < len(tokens)
        begins = np.cumsum(lengths) - lengths
        valid[begins[offsets > 0]] = False
        return Sample(
            _filled(tokens, columns, int(tokens[-1])),
            valid,
            _filled(np.repeat(np.arange(len(members)), lengths), columns, len(members)),
        )


def cut_documents(block: Block, seq_length: int) -> _Pieces:
    """Pieces of at most S tokens; after the first, each repeats one token and adds at most S - 1.

    Documents without tokens give none.
    """
    totals = np.diff(block.bounds)
    new_tokens = seq_length - 1
    counts = np.where(totals > seq_length, -(-(totals - 1) // new_tokens), totals > 0)
    documents = np.repeat(np.arange(len(totals)), counts)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(len(documents)) - firsts[documents]) * new_tokens
    return _Pieces(documents, offsets, np.minimum(totals[documents] - offsets, seq_length))


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` in all: each piece, the longest first, goes where it fits best.

    Returns the pieces of each bin. Of equal pieces the first one goes first, of equal bins the one
    that was opened first.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free columns, bin) of every bin that is not full
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[piece]
        place = bisect_left(room, (size, 0))
        if place == len(room):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = room.pop(place)
        bins[number].append(piece)
        if free > size:
            insort(room, (free - size, number))
    return bins


def _filled(values: np.ndarray, columns: int, filler: int) -> np.ndarray:
    """The values, and the filler up to the last column."""
    result = np.full(columns, filler, dtype=np.int64)
    result[: len(values)] = values
    return result
