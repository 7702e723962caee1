"""Documents come out whole and in order; what cannot be read is named, or counted and left out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpus_files import PACKERS, documents, json_lines, texts, write_parquet

from megatron_dlm.data.inputs.documents import Piece, Place
from megatron_dlm.data.inputs.input_plan import plan_jobs
from megatron_dlm.data.inputs.readers import read_documents

TEXTS = ["one\ntwo", "é \u2028 ü", "", "\ufeffmark \x85 \r\n", "🙂" * 9, 'quote " \\ \x00 end']


def packed(content: bytes) -> bytes:
    """Without the time, which would be part of the name of a test, and differ between workers."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n\r\n"])
def test_lines(tmp_path: Path, packing: str, suffix: str, end: str) -> None:
    path = tmp_path / f"a{suffix}{packing}"
    data = b"\xef\xbb\xbf" + json_lines(TEXTS, field="body", end=end)
    path.write_bytes(PACKERS[packing](data))
    assert texts(path, text_field="body") == TEXTS
    path.write_bytes(PACKERS[packing](data.rstrip()))
    assert texts(path, text_field="body") == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
def test_one_document_per_file_of_text(tmp_path: Path, packing: str) -> None:
    for name, text in {"a.py": "x = 1\r\n\ty\n", "b": "é\n", "c.v2": ""}.items():
        (tmp_path / f"{name}{packing}").write_bytes(PACKERS[packing](text.encode()))
    (tmp_path / f"d.txt{packing}").write_bytes(PACKERS[packing](b"\xef\xbb\xbf\xef\xbb\xbfhello"))
    found = [document.text for document in documents(f"{tmp_path}/*")]
    assert found == ["x = 1\r\n\ty\n", "é\n", "", "\ufeffhello"]


@pytest.mark.parametrize("packing", [".gz", ".zst", ".zstd"])
def test_packed_json_is_lines_and_plain_json_is_text(tmp_path: Path, packing: str) -> None:
    """As C4 and Dolma name their files, and as a folder of sources holds them."""
    pack = PACKERS[packing.removesuffix("d")]
    (tmp_path / f"a.json{packing}").write_bytes(pack(json_lines(TEXTS)))
    assert texts(tmp_path / f"a.json{packing}") == TEXTS
    (tmp_path / "b.json").write_text('{\n"text": "x"}\n')
    assert texts(tmp_path / "b.json") == ['{\n"text": "x"}\n']


@pytest.mark.parametrize("name", ["part-00000", "a.json", "part-00000.gz", "a.txt.zst"])
def test_lines_under_the_name_of_text_are_not_one_document(tmp_path: Path, name: str) -> None:
    pack = PACKERS[Path(name).suffix if Path(name).suffix in PACKERS else ""]
    path = tmp_path / name
    path.write_bytes(pack(json_lines(["a", "b"])))
    with pytest.raises(ValueError, match=rf"{name}: would be one document, .*name it \.jsonl"):
        texts(path)
    # Other objects, and a single one, are a text like any other.
    for data in (json_lines(["a", "b"], field="body"), json_lines(["a"])):
        path.write_bytes(pack(data))
        assert texts(path) == [data.decode()]


def test_members_and_frames_are_read_on(tmp_path: Path) -> None:
    first, second = json_lines(TEXTS[:3])[:-20], json_lines(TEXTS[:3])[-20:] + json_lines(["last"])
    members = gzip.compress(first) + gzip.compress(b"") + gzip.compress(second)
    (tmp_path / "a.jsonl.gz").write_bytes(members + bytes(7))
    compress = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"
    frames = skippable + compress(first) + skippable + compress(b"") + compress(second) + skippable
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path / "a.jsonl.gz") == [*TEXTS[:3], "last"]
    assert texts(tmp_path / "a.jsonl.zst") == [*TEXTS[:3], "last"]


def test_a_long_zstd_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(json_lines(TEXTS)) + packer.flush())
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_bytes_and_places_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "é"}\n{"text": "b"}')
    found = documents(path)
    assert sum(document.num_bytes for document in found) == path.stat().st_size
    assert [document.source for document in found] == [f"{path}:1", f"{path}:2"]
    assert [document.next for document in found] == [Place(0, 15), Place(0, 28)]


BAD_LINES = [
    (b'{"text": "a"', "invalid_json", r"not valid JSON \(unexpected end of data, column 13\)"),
    (b'{"text": "a"} {"text": "b"}', "invalid_json", "not valid JSON"),
    (b'{"text": "a\x01b"}', "invalid_json", "not valid JSON"),
    (b"[" * 3000 + b"]" * 3000, "invalid_json", "not valid JSON"),
    (b'{"n": 1' + b"0" * 5000 + b', "text": "a"}', "invalid_json", "not valid JSON"),
    (b"[1]", "not_an_object", "holds list, not an object with the key 'text'"),
    (b"null", "not_an_object", "holds NoneType, not an object"),
    (b'"text"', "not_an_object", "holds str, not an object"),
    (b'{"body": "x", "id": 1}', "missing_text", "'text' is missing; the keys are body, id"),
    (b'{"text": null}', "missing_text", "'text' is not a string"),
    (b'{"text": ["a"]}', "missing_text", "'text' is not a string"),
    (b'{"text": "\xff"}', "not_utf8", r"not UTF-8 \(byte 0xff at offset 10\)"),
    (b'{"text": "\xed\xa0\x80"}', "not_utf8", r"not UTF-8 \(byte 0xed at offset 10\)"),
    (b'{"text": "a \\ud83d b"}', "not_utf8", r"'text' holds \\ud83d, half of a surrogate pair"),
]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str, message: str, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    data = b'{"text": "fine"}\n\n' + line + b'\n{"text": "too"}\n' + line
    path.write_bytes(PACKERS[packing](data))
    with pytest.raises(ValueError, match=rf"{path}:3: {message}.*; .*--on_error skip$") as error:
        documents(path)
    assert "\n" not in str(error.value)
    counts = Counter[str]()
    assert [document.text for document in documents(path, left_out=counts)] == ["fine", "too"]
    assert counts == {reason: 2}


@pytest.mark.parametrize("job_bytes", [1, 16, 17, 18, 30, 1000])
def test_the_line_is_named_from_the_middle_of_a_file(tmp_path: Path, job_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 5 + b"\n" + b'{"text": 1}\n' + b'{"text": "too"}\n')
    with pytest.raises(ValueError, match=rf"{path}:7: 'text' is not a string"):
        documents(path, job_bytes=job_bytes)
    counts = Counter[str]()
    found = documents(path, job_bytes=job_bytes, left_out=counts)
    assert [document.source for document in found] == [f"{path}:{n}" for n in (1, 2, 3, 4, 5, 8)]
    assert counts == {"missing_text": 1}


@pytest.mark.parametrize("packing", PACKERS)
def test_far_into_a_file(tmp_path: Path, packing: str) -> None:
    """Places and line numbers hold over many buffers; lines may be longer than one."""
    path = tmp_path / f"a.jsonl{packing}"
    whole = [f"{number} " + "x" * (1_000_000 if number == 1500 else 700) for number in range(3000)]
    path.write_bytes(PACKERS[packing](json_lines(whole) + b"7\n" + json_lines(["last"])))
    counts = Counter[str]()
    found = documents(path, left_out=counts)
    assert [document.text for document in found] == [*whole, "last"]
    assert counts == {"not_an_object": 1}
    with pytest.raises(ValueError, match=rf"{path}:3001: holds int"):
        documents(path, job_bytes=200_000)
    (job,) = plan_jobs([path], job_bytes=1 << 30)
    for number in (0, 1499, 1500, 2998, 3000):
        stream = read_documents(
            job.pieces,
            text_field="text",
            on_error="skip",
            left_out=Counter(),
            start=found[number].next,
        )
        rest = list(stream)
        assert [document.text for document in rest] == [d.text for d in found[number + 1 :]]
        assert [document.source for document in rest[-1:]] == [f"{path}:3002"] * bool(rest)


@pytest.mark.parametrize("job_bytes", [1, 17, 18, 1000])
def test_a_mark_of_byte_order_is_one_at_the_beginning_of_a_file_only(
    tmp_path: Path, job_bytes: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n\xef\xbb\xbf{"text": "second"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON .*byte order mark"):
        documents(tmp_path / "a.jsonl", job_bytes=job_bytes)


def test_what_python_writes_is_read(tmp_path: Path) -> None:
    """NaN, and half a surrogate pair outside the text, are no reason to lose a text."""
    lines = [{"text": "a", "score": float("nan")}, {"url": "\ud83d", "text": "b\ud83d\ude00"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert texts(tmp_path / "a.jsonl") == ["a", "b😀"]


@pytest.mark.parametrize(
    ("name", "data", "reason", "message"),
    [
        ("a.txt", b"caf\xe9", "not_utf8", r"not UTF-8 \(byte 0xe9 at offset 3\)"),
        ("a.txt", b"ab\0c", "binary_file", "not text .NUL byte at offset 2"),
        ("a.txt.gz", packed(b"\x7fELF\0"), "binary_file", "not text .NUL byte at offset 4"),
        ("a.txt", "a".encode("utf-16"), "binary_file", "not text"),
        ("a.txt.gz", packed(b"text " * 99)[:-3], "truncated_file", "the gzip data ends in"),
        ("a.txt.zst", b"text", "damaged_file", "the zstd data is damaged"),
        ("a.txt.zst", b"", "empty_file", "is empty"),
        ("a.jsonl", b"", "empty_file", "is empty"),
        ("a.jsonl.gz", b"", "empty_file", "is empty"),
        ("a.jsonl.gz", packed(b""), "empty_file", "is empty"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "damaged_file", "the gzip data is damaged"),
        ("a.parquet", b"", "empty_file", "is empty"),
        ("a.parquet", b"PAR1" + bytes(99), "truncated_file", "not whole parquet"),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", "damaged_file", "not whole parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, reason: str, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text("fine")
    with pytest.raises(ValueError, match=rf"/{name}: {message}.*; .*--on_error skip$"):
        documents(f"{tmp_path}/*")
    counts = Counter[str]()
    found = documents(f"{tmp_path}/*", left_out=counts)
    assert [document.text for document in found] == ["fine"]
    assert counts == {reason: 1}


def compress_by_line(packing: str, lines: bytes) -> Iterator[bytes]:
    """A block ends with every line, so that a cut leaves something."""
    if packing == ".gz":
        gzip_packer = zlib.compressobj(wbits=31)
        for line in lines.splitlines(keepends=True):
            yield gzip_packer.compress(line) + gzip_packer.flush(zlib.Z_SYNC_FLUSH)
        yield gzip_packer.flush()
    else:
        zstd_packer = zstandard.ZstdCompressor(write_checksum=True).compressobj()
        for line in lines.splitlines(keepends=True):
            yield zstd_packer.compress(line)
            yield zstd_packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        yield zstd_packer.flush()


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_cut_anywhere_the_documents_before_are_kept(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    data = b"".join(compress_by_line(packing, json_lines(TEXTS * 3)))
    num_kept = []
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        counts = Counter[str]()
        found = [document.text for document in documents(path, left_out=counts)]
        assert found == (TEXTS * 3)[: len(found)]
        assert counts == {"truncated_file": 1}
        num_kept.append(len(found))
    assert num_kept == sorted(num_kept)
    assert set(num_kept) == set(range(3 * len(TEXTS) + 1))
    # Without its checksum only, the text is whole.
    assert num_kept[-1] == 3 * len(TEXTS)
    with pytest.raises(ValueError, match=rf"a\.jsonl{packing}: the \w+ data ends in the middle"):
        documents(path)


def test_a_wrong_checksum_is_told_after_the_documents(tmp_path: Path) -> None:
    packer = zstandard.ZstdCompressor(write_checksum=True)
    for name, data in {
        "a.jsonl.gz": gzip.compress(json_lines(TEXTS))[:-8] + bytes(8),
        "a.jsonl.zst": packer.compress(json_lines(TEXTS))[:-4] + bytes(4),
    }.items():
        (tmp_path / name).write_bytes(data)
        counts = Counter[str]()
        found = documents(tmp_path / name, left_out=counts)
        assert [document.text for document in found] == TEXTS
        assert counts == {"damaged_file": 1}


def test_a_file_that_changed_since_the_plan(tmp_path: Path) -> None:
    def read(path: Path, begin: int, end: int) -> None:
        piece = Piece(str(path), begin, end)
        list(read_documents([piece], text_field="text", on_error="skip", left_out=Counter()))

    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(ValueError, match=r"a\.jsonl: holds .* bytes, 100,000 were planned for"):
        read(tmp_path / "a.jsonl", 0, 100_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match=r"a\.txt\.gz: holds .* bytes, 5 were planned for"):
        read(tmp_path / "a.txt.gz", 0, 5)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    piece = Piece(str(tmp_path / "a.jsonl.gz"), 0, (tmp_path / "a.jsonl.gz").stat().st_size)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: unpacks to 14 bytes, 99 were read before"):
        list(
            read_documents(
                [piece], text_field="text", on_error="skip", left_out=Counter(), start=Place(0, 99)
            )
        )
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for end in (0, 9):
        with pytest.raises(ValueError, match="row groups, not those of the plan"):
            read(tmp_path / "a.parquet", 0, end)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read(tmp_path / "gone.jsonl", 0, 5)
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        read(tmp_path / "gone.parquet", 0, 5)


def test_the_count_is_that_of_the_document(tmp_path: Path) -> None:
    """Who stops after a document has counted what lies before it and nothing else."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'1\n{"text": "a"}\n2\n3\n{"text": "b"}\n4\n')
    counts = Counter[str]()
    piece = Piece(str(path), 0, path.stat().st_size)
    stream = read_documents([piece], text_field="text", on_error="skip", left_out=counts)
    assert [(document.text, counts.total()) for document in stream] == [("a", 1), ("b", 3)]
    assert counts.total() == 4


def test_a_piece_inside_a_giant_line_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["x" * 20_000_000, "last"]))
    assert [len(text) for text in texts(path, job_bytes=1_000_000)] == [20_000_000, 4]
    piece = Piece(str(path), 1_000_000, 6_000_000)
    tracemalloc.start()
    try:
        inside = read_documents([piece], text_field="text", on_error="stop", left_out=Counter())
        assert list(inside) == []
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


MEMORY = """
import sys
from collections import Counter
from pathlib import Path
import pyarrow.parquet
from megatron_dlm.data.inputs.input_plan import plan_jobs
from megatron_dlm.data.inputs.readers import read_documents

def peak():  # of this program alone: getrusage starts at the peak of the one that started it
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before, num_bytes = peak(), 0
for job in plan_jobs([Path(sys.argv[1])], job_bytes=1 << 40):
    for document in read_documents(job.pieces, text_field="text", on_error="stop",
                                   left_out=Counter()):
        num_bytes += len(document.text)
print(num_bytes, peak() - before)
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"a{suffix}", "some words, " * 500
    num_documents = 30_000
    if suffix == ".parquet":  # one row group, as large on disk as in memory
        table = pyarrow.table({"text": [f"{number} {text}" for number in range(num_documents)]})
        pyarrow.parquet.write_table(
            table, path, row_group_size=num_documents, use_dictionary=False, compression="none"
        )
    else:
        opener = {".jsonl": open, ".gz": gzip.open, ".zst": zstandard.open}[path.suffix]
        with opener(path, "wb") as stream:  # type: ignore[operator]
            for _ in range(30):
                stream.write(json_lines([text]) * (num_documents // 30))
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    num_characters, growth_bytes = map(int, answer.stdout.split())
    assert num_characters >= num_documents * len(text) == 180_000_000
    assert growth_bytes < 90_000_000
