"""Damaged input never breaks the readers, and what lies before the damage comes out."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet
import pytest
import zstandard
from corpus_files import PACKERS, documents, json_lines, write_parquet
from hypothesis import example, given, settings
from hypothesis import strategies as st

TEXTS = [f"document {number} " + "é🙂 words" * (number % 7) for number in range(60)]
FUZZ = settings(deadline=None, max_examples=200)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few changed, taken out or put in, or cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = begin + draw(st.sampled_from([0, 1, 1, 2, 9]))
        data[begin:end] = draw(st.binary(max_size=4))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def read(name: str, data: bytes) -> tuple[list[str], Counter[str]]:
    """Texts and what was left out; where something is, stopping must name the file."""
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        counts = Counter[str]()
        found = [document.text for document in documents(path, left_out=counts)]
        if counts:
            with pytest.raises(ValueError, match=name):
                documents(path)
        else:
            assert [document.text for document in documents(path)] == found
    return found, counts


def texts_of(data: bytes, *, is_cut: bool = False) -> tuple[list[str], int]:
    """Reference: texts by Python's own JSON, and the number of lines that give none."""
    found, num_bad = [], 0
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip(b" \t\r\n"):
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
            found.append(text)
        except (ValueError, KeyError, TypeError, AttributeError):
            num_bad += not (is_cut and number == len(lines) - 1)
    return found, num_bad


@FUZZ
@given(damaged(json_lines(TEXTS[:9])) | st.binary())
@example(b"\xef\xbb\xbf")
@example(b'\x0b\n\x0c{"text": "a"}')
@example(b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}")
def test_lines(data: bytes) -> None:
    found, counts = read("a.jsonl", data)
    expected, num_bad = texts_of(data)
    assert found == expected
    assert counts.total() == (num_bad if data else 1)


@FUZZ
@given(damaged(json_lines(TEXTS[:9])) | st.binary())
def test_text(data: bytes) -> None:
    try:
        found, counts = read("a.txt", data)
    except ValueError as error:
        if "name it .jsonl" not in str(error):
            raise
        return
    try:
        expected = [data.decode().removeprefix("\ufeff")] if b"\0" not in data else []
    except UnicodeDecodeError:
        expected = []
    assert found == expected
    assert counts.total() == 1 - len(expected)


def gunzip(data: bytes) -> tuple[bytes, bool]:
    """Reference: what zlib gives for byte after byte, and whether it reached the end."""
    output, decoder = b"", None
    for place in range(len(data)):
        if decoder is None:
            if data[place] == 0:
                continue
            decoder = zlib.decompressobj(wbits=31)
        try:
            output += decoder.decompress(data[place : place + 1])
        except zlib.error:
            return output, False
        decoder = None if decoder.eof else decoder
    return output, decoder is None


@FUZZ
@given(damaged(PACKERS[".gz"](json_lines(TEXTS)) * 2) | st.binary())
def test_gzip(data: bytes) -> None:
    unpacked, is_whole = gunzip(data)
    found, counts = read("a.jsonl.gz", data)
    expected, num_bad = texts_of(unpacked, is_cut=not is_whole)
    assert found == expected
    assert counts["truncated_file"] + counts["damaged_file"] == (not is_whole)
    assert counts.total() == num_bad + (not is_whole or not unpacked)


def unpack_zstd(data: bytes) -> tuple[bytes, bool]:
    """Reference: what a stream writer gives of one frame for byte after byte."""
    output = io.BytesIO()
    writer = zstandard.ZstdDecompressor().stream_writer(output, closefd=False)
    for place in range(len(data)):
        try:
            writer.write(data[place : place + 1])
        except zstandard.ZstdError:
            return output.getvalue(), False
    return output.getvalue(), True


def small_blocks() -> bytes:
    """One zstd frame of many blocks, with a checksum."""
    packer = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    data = b""
    for line in json_lines(TEXTS).splitlines(keepends=True):
        data += packer.compress(line) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return data + packer.flush()


@FUZZ
@given(damaged(small_blocks()) | st.binary())
def test_zstd(data: bytes) -> None:
    unpacked, _ = unpack_zstd(data)
    found, counts = read("a.jsonl.zst", data)
    expected, num_bad = texts_of(unpacked, is_cut=True)
    is_damaged = counts["truncated_file"] + counts["damaged_file"]
    assert is_damaged <= 1
    assert found[: len(expected)] == expected
    assert num_bad <= counts.total() - is_damaged


def parquet_bytes(group_rows: int) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        write_parquet(path, TEXTS, group_rows=group_rows)
        return path.read_bytes()


@FUZZ
@given(damaged(parquet_bytes(group_rows=10)) | st.binary())
def test_parquet(data: bytes) -> None:
    try:
        read("a.parquet", data)
    except ValueError as error:
        # A damaged footer may lack the column.
        if "has no column 'text'" not in str(error) and "not text" not in str(error):
            raise


@FUZZ
@given(st.data())
def test_parquet_keeps_the_row_groups_that_are_whole(data: st.DataObject) -> None:
    contents = bytearray(parquet_bytes(group_rows=10))
    metadata = pyarrow.parquet.read_metadata(io.BytesIO(contents))
    footer = len(contents) - 8 - metadata.serialized_size
    place = data.draw(st.integers(4, footer - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    found, _ = read("a.parquet", bytes(contents))
    expected = []
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(1)
        begin = column.dictionary_page_offset or column.data_page_offset
        if not begin <= place < begin + column.total_compressed_size:
            expected += TEXTS[10 * group : 10 * group + 10]
    assert len(expected) >= len(TEXTS) - 10
    assert set(expected) <= set(found)
    assert [text for text in found if text in set(expected)] == expected
