"""A document, where it comes from, and what happens to text that cannot be one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_dlm.data.inputs.byte_streams import num_lines_before
from megatron_dlm.data.inputs.formats import format_of

Reason = Literal[
    "invalid_json",
    "not_an_object",
    "missing_text",
    "not_utf8",
    "binary_file",
    "truncated_file",
    "damaged_file",
    "empty_file",
]


@dataclass(frozen=True)
class Piece:
    """A stretch of one input."""

    path: str
    begin: int
    """plain lines: byte; parquet: row group; everything else 0."""
    end: int
    """Exclusive; plain lines: byte; parquet: row group; everything else the file's size in bytes.

    A stretch of bytes owns the lines that start in it.
    """


class Place(NamedTuple):
    """Where the next document of a job begins: reading goes on there after a stop."""

    piece: int
    """Number of the piece in the job."""
    offset: int
    """lines: bytes of the unpacked file; parquet: rows from the begin of the piece; text: 0 or 1.

    0 stands for the begin of the piece.
    """


BEGINNING = Place(0, 0)


class Origin(NamedTuple):
    """Where a text lies; `str` says it as FILE:LINE, FILE:row ROW or FILE."""

    path: str
    unit: Literal["line", "row", "file"]
    number: int = 0
    """Lines count from 1 at byte `after` of the unpacked file, rows from 0 in the whole file."""
    after: int = 0

    def __str__(self) -> str:
        if self.unit == "line":
            # Counting the lines before a piece costs a read: only for those who ask.
            before = num_lines_before(self.path, format_of(self.path).codec, self.after)
            return f"{self.path}:{before + self.number}"
        return f"{self.path}:row {self.number}" if self.unit == "row" else self.path


class Document(NamedTuple):
    """One text. A named tuple, for there are billions and a frozen dataclass costs twice that."""

    text: str
    num_bytes: int
    """Unpacked bytes: of the line with its end, of the row's text in UTF-8, or of the file."""
    next: Place
    """Where the following document begins."""
    origin: Origin

    @property
    def source(self) -> str:
        """FILE:LINE, FILE:row ROW or FILE; may have to read the file up to there."""
        return str(self.origin)


class UnusableText(Exception):
    """Input that gives no document; `ReadingRules.leave_out` stops or counts."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True)
class ReadingRules:
    """What every reader has to know."""

    text_field: str
    """Key of a JSON object, or column of a parquet file."""
    on_error: Literal["stop", "skip"]
    left_out: Counter[str]
    """Counts what was skipped, by `Reason`."""

    def leave_out(self, problem: UnusableText, origin: Origin) -> None:
        """Count the text that is skipped; ValueError with its place where reading must stop."""
        if self.on_error == "stop":
            raise ValueError(f"{origin}: {problem}; or leave it out with --on_error skip") from None
        self.left_out[problem.reason] += 1


def decode_text(data: bytes) -> str:
    """UTF-8 to text; UnusableText names the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableText(
            "not_utf8",
            f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); convert it to "
            "UTF-8",
        ) from None
