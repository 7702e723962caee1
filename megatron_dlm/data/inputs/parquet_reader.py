"""Documents of a parquet file: one column of text, a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_dlm.data.inputs.documents import (
    Document,
    Origin,
    Piece,
    Place,
    ReadingRules,
    Reason,
    UnusableText,
    decode_text,
)

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# Rows may be whole books: memory holds these, and a page of the file.
_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20
_LAST_BYTES = b"PAR1"


def rows_of_groups(path: str) -> list[int]:
    """Rows of every row group by the file's footer; none where that is damaged: reading tells."""
    try:
        with _open(path) as file:
            return _rows_of_groups(file)
    except UnusableText:
        return []


def read_parquet(piece: Piece, number: int, offset: int, rules: ReadingRules) -> Iterator[Document]:
    """Documents of piece `number` of a job, from its row `offset` on.

    What lies behind a damaged page in its row group is left out; the next row group is whole again.
    """
    try:
        with _open(piece.path) as file:
            yield from _read_groups(file, piece, Place(number, offset), rules)
    except UnusableText as problem:
        rules.leave_out(problem, Origin(piece.path, "file"))


def _read_groups(
    file: ParquetFile, piece: Piece, start: Place, rules: ReadingRules
) -> Iterator[Document]:
    sizes = _rows_of_groups(file)
    if sum(sizes) == 0:
        raise UnusableText("empty_file", "holds no row; remove it from the input")
    if not piece.begin < piece.end <= len(sizes):
        raise ValueError(
            f"{piece.path}: holds {len(sizes)} row groups, not those of the plan; start anew "
            "and leave the input alone meanwhile"
        )
    _check_column(file, piece.path, rules.text_field)
    begin = row = sum(sizes[: piece.begin])
    for group in range(piece.begin, piece.end):
        skip = max(begin + start.offset - row, 0)
        if skip < sizes[group]:
            values = _read_values(file, group, rules.text_field, skip)
            counted_from = Place(start.piece, begin)
            yield from _documents(
                values, Origin(piece.path, "row", row + skip), counted_from, rules
            )
        row += sizes[group]


def _documents(
    values: Iterator[bytes | None], origin: Origin, counted_from: Place, rules: ReadingRules
) -> Iterator[Document]:
    """Documents of rows that begin at `origin`; their places count from a row of the file."""
    piece, begin = counted_from
    try:
        for value in values:
            here, origin = origin, origin._replace(number=origin.number + 1)
            try:
                data, text = _text_of(value, rules.text_field)
            except UnusableText as problem:
                rules.leave_out(problem, here)
                continue
            yield Document(text, len(data), Place(piece, origin.number - begin), here)
    except UnusableText as problem:
        rules.leave_out(problem, origin)


def _text_of(value: bytes | None, column: str) -> tuple[bytes, str]:
    if value is None:
        raise UnusableText("missing_text", f"{column!r} is null; remove the row")
    return value, decode_text(value)


def _read_values(
    file: ParquetFile, group: int, column: str, skip: int, at_once: int = _BATCH_ROWS
) -> Iterator[bytes | None]:
    """Values of a row group from row `skip` on; near damage one by one, to lose none before it."""
    import pyarrow

    row, num_rows = 0, file.metadata.row_group(group).num_rows
    try:
        with _damage_as("damaged_file"):
            for batch in file.iter_batches(
                at_once, row_groups=[group], columns=[column], use_threads=False
            ):
                values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                yield from values[max(skip - row, 0) :]
                row += len(values)
        if row != num_rows:
            what = f"holds {row} rows in row group {group}, {num_rows} by its footer"
            raise UnusableText("damaged_file", f"{what}; fetch the file again")
    except UnusableText:
        if at_once == 1:
            raise
        yield from _read_values(file, group, column, max(row, skip), at_once=1)


def _check_column(file: ParquetFile, path: str, name: str) -> None:
    """ValueError where the file has no column of text by that name."""
    from pyarrow import types

    with _damage_as("damaged_file"):
        schema = file.schema_arrow
        names = schema.names
    if name not in names:
        raise ValueError(
            f"{path}: has no column {name!r}; its columns are {', '.join(names)}: set text_field"
        )
    kind = schema.field(names.index(name)).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (
        types.is_string, types.is_large_string, types.is_string_view,
        types.is_binary, types.is_large_binary, types.is_binary_view,
    )  # fmt: skip
    if not any(test(kind) for test in tests):
        raise ValueError(f"{path}: column {name!r} is {kind}, not text; set text_field")


def _rows_of_groups(file: ParquetFile) -> list[int]:
    metadata = file.metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows:
        what = f"holds {sum(rows)} rows in row groups, {metadata.num_rows} in all by its footer"
        raise UnusableText("damaged_file", f"{what}; fetch the file again")
    return rows


@contextmanager
def _damage_as(reason: Reason) -> Iterator[None]:
    """Arrow's complaints about a file's contents as UnusableText; the system's pass through."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        what = " ".join(str(error).split())
        raise UnusableText(reason, f"not whole parquet ({what}); fetch the file again") from None


@contextmanager
def _open(path: str) -> Iterator[ParquetFile]:
    from pyarrow.parquet import ParquetFile

    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_LAST_BYTES), 0))
        ends_well = file.read() == _LAST_BYTES
    if size == 0:
        raise UnusableText("empty_file", "is empty; remove it from the input")
    with _damage_as("damaged_file" if ends_well else "truncated_file"):
        parquet = ParquetFile(
            path,
            # Stream the pages of a row group: it may be larger than memory.
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            page_checksum_verification=True,
        )
    with parquet:
        yield parquet
