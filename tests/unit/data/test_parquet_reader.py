"""Rows of parquet come out whole; damage is told, and what lies outside of it is kept."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpus_files import documents, write_parquet

from megatron_dlm.data.inputs.input_plan import plan_jobs
from megatron_dlm.data.inputs.readers import read_documents

TEXTS = ["one\ntwo", "é \u2028 ü", "", "\ufeffmark \x85 \r\n", "🙂" * 9, 'quote " \\ \x00 end']


@pytest.mark.parametrize(
    "type_name", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]
)
def test_parquet_columns(tmp_path: Path, type_name: str) -> None:
    if type_name == "dictionary":
        column = pyarrow.array(TEXTS).dictionary_encode()
    elif "binary" in type_name:
        column = pyarrow.array([text.encode() for text in TEXTS], type_name)
    else:
        column = pyarrow.array(TEXTS, type_name)
    table = pyarrow.table({"id": range(len(TEXTS)), "content.text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    found = documents(tmp_path / "a.parquet", text_field="content.text")
    assert [document.text for document in found] == TEXTS
    assert [document.num_bytes for document in found] == [len(text.encode()) for text in TEXTS]
    assert [document.source for document in found] == [
        f"{tmp_path}/a.parquet:row {row}" for row in range(len(TEXTS))
    ]


@pytest.mark.parametrize("group_rows", [3000, 1000])
def test_rows_before_and_after_a_damaged_page_are_kept(tmp_path: Path, group_rows: int) -> None:
    path, rows = tmp_path / "a.parquet", [f"row {n} {'x' * 200}" for n in range(3000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}),
        path,
        row_group_size=group_rows,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=4000,
        write_batch_size=10,
    )
    data = bytearray(path.read_bytes())
    # Where the pages have no statistics, a page header begins like this.
    bad_page = data.rindex(b"\x15\x00\x15", 0, data.index(b"row 1500 "))
    first_bad = int(data[data.index(b"row ", bad_page) :].split()[1])
    assert 1450 < first_bad <= 1500
    data[bad_page : bad_page + 8] = b"\xff" * 8
    path.write_bytes(data)
    counts = Counter[str]()
    found = documents(path, left_out=counts)
    next_group = (1500 // group_rows + 1) * group_rows
    assert [document.text for document in found] == rows[:first_bad] + rows[next_group:]
    assert counts == {"damaged_file": 1}
    with pytest.raises(ValueError, match=rf"a\.parquet:row {first_bad}: not whole parquet"):
        documents(path)
    (job,) = plan_jobs([path], job_bytes=1 << 30)
    for number in (first_bad - 3, first_bad - 2, first_bad - 1):
        rest = read_documents(
            job.pieces,
            text_field="text",
            on_error="skip",
            left_out=counts,
            start=found[number].next,
        )
        assert list(rest) == found[number + 1 :]
    assert counts == {"damaged_file": 4}


@pytest.mark.parametrize("has_checksums", [True, False])
def test_no_flipped_bit_loses_a_row_in_silence(tmp_path: Path, has_checksums: bool) -> None:
    """Nor changes one, where the pages have checksums."""
    path, rows = tmp_path / "a.parquet", ["a", "b", "c", "d", "e"] * 5
    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(
        table, path, store_schema=False, use_dictionary=False, write_page_checksum=has_checksums
    )
    data = path.read_bytes()
    num_told = 0
    for place, bit in product(range(4, len(data) - 8), range(8)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            found = [document.text for document in documents(path)]
        except ValueError:
            num_told += 1
        else:
            assert found == rows if has_checksums else len(found) == len(rows), (place, bit)
    assert num_told > 500


def test_a_column_with_a_damaged_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"odd": [1], "text": ["a"]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"odd", b"\xb7dd"))
    with pytest.raises(ValueError, match=rf"{path}: not whole parquet"):
        documents(path)


def test_bad_rows_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["a", None, "c", "d", None], group_rows=2)
    counts = Counter[str]()
    found = documents(path, left_out=counts, job_bytes=1)
    assert [(d.text, d.source) for d in found] == [
        ("a", f"{path}:row 0"), ("c", f"{path}:row 2"), ("d", f"{path}:row 3"),
    ]  # fmt: skip
    assert counts == {"missing_text": 2}
    with pytest.raises(ValueError, match=rf"{path}:row 1: 'text' is null"):
        documents(path)
    for left_out in (None, Counter[str]()):
        with pytest.raises(ValueError, match="has no column 'body'; its columns are id, text"):
            documents(path, text_field="body", left_out=left_out)
        with pytest.raises(ValueError, match="column 'id' is int64, not text"):
            documents(path, text_field="id", left_out=left_out)
    table = pyarrow.table({"text": pyarrow.array([b"ok", b"caf\xe9"], "binary")})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=rf"{path}:row 1: not UTF-8 \(byte 0xe9 at offset 3\)"):
        documents(path)
    write_parquet(path, [])
    with pytest.raises(ValueError, match=rf"{path}: holds no row"):
        documents(path)
