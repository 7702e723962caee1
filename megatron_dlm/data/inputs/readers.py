"""Text documents from files: lines of JSON, rows of parquet, or one per file of text."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import orjson

from megatron_dlm.data.inputs.byte_streams import ByteStream, open_bytes
from megatron_dlm.data.inputs.documents import (
    BEGINNING,
    Document,
    Origin,
    Piece,
    Place,
    ReadingRules,
    UnusableText,
    decode_text,
)
from megatron_dlm.data.inputs.formats import Format, format_of
from megatron_dlm.data.inputs.parquet_reader import read_parquet

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_BLANKS = b" \t\r\n"
# A line may be as long as its file, which must not be held for nothing.
_LINE_PART_BYTES = 1 << 20
_SHOWN_KEYS = 12


def read_documents(
    pieces: Iterable[Piece],
    *,
    text_field: str,
    on_error: Literal["stop", "skip"],
    left_out: Counter[str],
    start: Place = BEGINNING,
) -> Iterator[Document]:
    """Stream the documents of the pieces in order, from `start` on.

    Memory holds a few lines or rows of a file, or one whole text file. Text that cannot be used
    raises ValueError (`stop`) or is counted by `Reason` in `left_out` (`skip`), which is up to date
    whenever a document comes out. What comes before damage in a file is given. Whatever `on_error`:
    ValueError for a parquet column that is not there, line-delimited JSON under the name of a text,
    and a file that changed since the plan; OSError for a file that cannot be opened.
    """
    rules = ReadingRules(text_field, on_error, left_out)
    for number, piece in enumerate(pieces):
        if number < start.piece:
            continue
        offset = start.offset if number == start.piece else 0
        read = _READERS[format_of(piece.path).layout]
        yield from read(piece, number, offset, rules)


def _read_lines(piece: Piece, number: int, offset: int, rules: ReadingRules) -> Iterator[Document]:
    """Documents of the lines that start in the piece, from byte `offset` of the file on."""
    codec = format_of(piece.path).codec
    end = piece.end if codec is None else sys.maxsize
    with open_bytes(piece.path, codec) as stream:
        _check_size(piece)
        position = first = _go_to_first_line(stream, piece, offset)
        if 0 < end <= position:
            return
        for line_number, line in enumerate(stream, start=1):
            if position >= end:
                return
            position += len(line)
            origin = Origin(piece.path, "line", line_number, first)
            try:
                text = orjson.loads(line)[rules.text_field]
            except (ValueError, TypeError, KeyError):
                text = None
            if type(text) is not str and (text := _look_again(line, stream, origin, rules)) is None:
                continue
            yield Document(text, len(line), Place(number, position), origin)
        if stream.damage is not None:
            rules.leave_out(UnusableText(*stream.damage), Origin(piece.path, "file"))
        elif position == 0:
            rules.leave_out(_empty_file(), Origin(piece.path, "file"))


def _go_to_first_line(stream: ByteStream, piece: Piece, offset: int) -> int:
    """Move to the first line to read; returns where it begins, or a byte behind the piece."""
    if offset > piece.begin or piece.begin == 0:
        stream.skip_to(offset)
        return offset
    # A line that is under way here belongs to the piece before; it may end just before us.
    position = piece.begin - 1
    stream.skip_to(position)
    while position < piece.end:
        part = stream.readline(_LINE_PART_BYTES)
        position += len(part)
        if part.endswith(b"\n"):
            break
    return position


def _look_again(line: bytes, stream: ByteStream, origin: Origin, rules: ReadingRules) -> str | None:
    """Text of a line that the fast path refused; None for a blank or unusable one."""
    if origin.after == 0 and origin.number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    record = line.strip(_JSON_BLANKS)
    if not record:
        return None
    try:
        return _text_of_line(record, rules.text_field)
    except UnusableText as problem:
        # A last line that damage cut short is part of the damage.
        if stream.damage is None or line.endswith(b"\n"):
            rules.leave_out(problem, origin)
        return None


def _text_of_line(line: bytes, field: str) -> str:
    record = _parse(line)
    if not isinstance(record, dict):
        raise UnusableText(
            "not_an_object",
            f"holds {type(record).__name__}, not an object with the key {field!r}; repair the line",
        )
    text = record.get(field)
    if not isinstance(text, str):
        state = "is not a string" if field in record else "is missing"
        keys = ", ".join(list(record)[:_SHOWN_KEYS])
        raise UnusableText(
            "missing_text", f"{field!r} {state}; the keys are {keys}: set text_field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise UnusableText(
            "not_utf8",
            f"{field!r} holds {surrogate}, half of a surrogate pair, which UTF-8 has no bytes for; "
            "repair the line",
        ) from None
    return text


def _parse(line: bytes) -> object:
    """The record of a line; Python's own JSON, with its NaN and half surrogates, is taken too."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        strict = error
    try:
        return json.loads(decode_text(line))
    except (ValueError, RecursionError):
        raise UnusableText(
            "invalid_json", f"not valid JSON ({strict.msg}, column {strict.colno}); repair the line"
        ) from None


def _read_text(piece: Piece, number: int, offset: int, rules: ReadingRules) -> Iterator[Document]:
    """The whole file as one document."""
    if offset > 0:
        return
    try:
        data = _whole_file(piece, rules.text_field)
        text = decode_text(data).removeprefix("\ufeff")
    except UnusableText as problem:
        rules.leave_out(problem, Origin(piece.path, "file"))
    else:
        yield Document(text, len(data), Place(number, 1), Origin(piece.path, "file"))


def _whole_file(piece: Piece, field: str) -> bytes:
    """The file's bytes, unpacked; UnusableText where they are not text."""
    codec = format_of(piece.path).codec
    with open_bytes(piece.path, codec) as stream:
        _check_size(piece)
        first_line = stream.readline(_LINE_PART_BYTES)
        _check_not_lines(first_line, stream.peek(1), piece.path, field)
        data = first_line + stream.read()
        damage = stream.damage
    if damage is not None:
        raise UnusableText(*damage)
    if codec is not None and piece.end == 0:
        raise _empty_file()
    if (place := data.find(0)) >= 0:
        raise UnusableText("binary_file", f"not text (NUL byte at offset {place}); remove it")
    return data


def _check_not_lines(first_line: bytes, next_line: bytes, path: str, field: str) -> None:
    """ValueError where a file that is to be one text is clearly one JSON object per line."""
    if not (first_line.startswith(b"{") and first_line.endswith(b"\n") and next_line[:1] == b"{"):
        return
    try:
        _text_of_line(first_line, field)
    except UnusableText:
        return
    raise ValueError(
        f"{path}: would be one document, but every line of it seems to be one ({field!r} is a key "
        "of the first); name it .jsonl, .jsonl.gz or .jsonl.zst"
    )


def _check_size(piece: Piece) -> None:
    """ValueError where the file is not the one that was planned for."""
    size = os.stat(piece.path).st_size
    is_cut = format_of(piece.path) == Format("lines", None)
    if size < piece.end or (size > piece.end and not is_cut):
        raise ValueError(
            f"{piece.path}: holds {size:,} bytes, {piece.end:,} were planned for; start anew and "
            "leave the input alone meanwhile"
        )


def _empty_file() -> UnusableText:
    return UnusableText("empty_file", "is empty; remove it from the input")


_READERS = {"lines": _read_lines, "parquet": read_parquet, "text": _read_text}
