"""The documents of a job in batches, cut into the parts that become shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.documents import Document, Piece, Place
from megatron_dlm.data.inputs.readers import read_documents
from megatron_dlm.data.storage.manifest import Source

# A batch is encoded at once; memory holds a few of them, whatever the size of the files.
_BATCH_DOCUMENTS = 4096
_BATCH_CHARACTERS = 4_000_000


class PartEnd(NamedTuple):
    """What is known when the last document of a part has been read."""

    sources: list[Source]
    left_out: dict[str, int]
    """Reason -> documents (or files)."""
    next: Place
    """Where the next part begins."""
    is_last: bool
    """The job ends here."""


@dataclass
class Batch:
    """Documents that follow each other in one part."""

    texts: list[str] = field(default_factory=list)
    num_characters: int = 0
    num_documents: int = 0
    """Documents read, those left out included."""
    num_bytes: int = 0
    """Bytes read, unpacked."""
    end: PartEnd | None = None
    """The part ends with this batch."""

    def add(self, document: Document, *, is_kept: bool) -> None:
        self.num_documents += 1
        self.num_bytes += document.num_bytes
        if is_kept:
            self.texts.append(document.text)
            self.num_characters += len(document.text)

    def is_full(self) -> bool:
        return len(self.texts) >= _BATCH_DOCUMENTS or self.num_characters >= _BATCH_CHARACTERS


def read_batches(
    pieces: Sequence[Piece], config: PreprocessConfig, start: Place
) -> Iterator[Batch]:
    """The documents from `start` on; every part, and only its last batch, has an `end`.

    A part ends behind the document with which shard_size_bytes have been read: a function of the
    text alone. A job without documents is one empty part. Raises ValueError at text that cannot be
    read, unless it is to be skipped.
    """
    left_out: Counter[str] = Counter()
    documents = read_documents(
        pieces,
        text_field=config.text_field,
        on_error=config.on_error,
        left_out=left_out,
        start=start,
    )
    batch, stretch = Batch(), _Stretch(pieces, start)
    document = next(documents, None)
    while document is not None:
        is_kept = len(document.text) >= config.minimum_characters
        left_out["too_short"] += not is_kept
        batch.add(document, is_kept=is_kept)
        stretch.add(document)
        is_part_full = stretch.num_bytes >= config.shard_size_bytes
        counted = +left_out if is_part_full else None  # before reading on counts more
        place, document = document.next, next(documents, None)
        if counted is not None and document is not None:
            batch.end = PartEnd(stretch.sources(), dict(counted), place, is_last=False)
            left_out.subtract(counted)
            stretch = _Stretch(pieces, place)
        if batch.end is not None or batch.is_full():
            yield batch
            batch = Batch()
    end = Place(len(pieces), 0)
    batch.end = PartEnd(stretch.sources(), dict(+left_out), end, is_last=True)
    yield batch


class _Stretch:
    """What has been read since a place."""

    def __init__(self, pieces: Sequence[Piece], start: Place) -> None:
        self.num_bytes = 0
        self._pieces, self._start = pieces, start
        self._sources: list[Source] = []
        self._last: Document | None = None

    def add(self, document: Document) -> None:
        self.num_bytes += document.num_bytes
        if self._last is not None and self._last.next.piece != document.next.piece:
            self._sources.append(self._source_of(self._last))
        self._last = document

    def sources(self) -> list[Source]:
        """One for every piece that gave a document."""
        return self._sources + ([self._source_of(self._last)] if self._last is not None else [])

    def _source_of(self, last: Document) -> Source:
        """From the begin of the piece, or from where reading began in it, to its last document."""
        number, end = last.next
        piece = self._pieces[number]
        offset = self._start.offset if number == self._start.piece else 0
        if last.origin.unit == "line":
            return Source(piece.path, offset or piece.begin, end)
        if last.origin.unit == "row":
            first_row = last.origin.number + 1 - end
            return Source(piece.path, first_row + offset, first_row + end)
        return Source(piece.path, 0, last.num_bytes)
