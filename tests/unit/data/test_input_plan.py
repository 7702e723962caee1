"""Whatever the plan, its pieces give every document once and in order, and any place resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from corpus_files import PACKERS, documents, json_lines, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.data.inputs.documents import Document, Piece
from megatron_dlm.data.inputs.input_plan import Job, find_files, plan_digest, plan_jobs
from megatron_dlm.data.inputs.readers import read_documents


def names(directory: Path, *inputs: str) -> list[str]:
    """Files that are found, relative to the directory."""
    return [path.relative_to(directory).as_posix() for path in find_files(inputs)]


def touch(directory: Path, *files: str) -> None:
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(file)


def test_directories_and_globs_are_sorted_and_unique(tmp_path: Path) -> None:
    touch(tmp_path, "b.txt", "a.py", "sub/c.md", "sub/d.pyc", "e.bin", "sub.md", "f.jsonl.zst")
    touch(tmp_path, "sub/g.PARQUET", "sub/h.json.gz", ".git/x.txt", "sub/.y.txt", "i.tar.gz")
    everything = ["a.py", "b.txt", "f.jsonl.zst", "sub/c.md", "sub/g.PARQUET", "sub/h.json.gz"]
    assert names(tmp_path, str(tmp_path)) == [*everything, "sub.md"]
    assert names(tmp_path, f"{tmp_path}/*.txt", str(tmp_path)) == [
        "b.txt", "a.py", *everything[2:], "sub.md",
    ]  # fmt: skip
    # A file is named by itself whatever it is called; ** goes to any depth.
    assert names(tmp_path, f"{tmp_path}/**/*.md", f"{tmp_path}/e.bin") == [
        "sub/c.md", "sub.md", "e.bin",
    ]  # fmt: skip


def test_each_file_once_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "sub/a.txt", "b.txt")
    (tmp_path / "link.txt").symlink_to("b.txt")
    monkeypatch.chdir(tmp_path)
    inputs = ["sub/../b.txt", "./sub", f"{tmp_path}/sub/a.txt", "link.txt", "b.txt"]
    assert find_files(inputs) == [Path("sub/../b.txt"), Path("sub/a.txt")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files(["~/b.txt"]) == [tmp_path / "b.txt"]


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "odd [1]/b.txt", "odd [1]/c d.txt", "odd [1]/sub/e.txt", "a.txt", "f#.txt")
    folder = tmp_path / "odd [1]"
    (folder / "list").write_text(f"# files\n\n../f#.txt\n  c d.txt \nsub\n*.txt\n{tmp_path}/a.txt")
    expected = ["f#.txt", "odd [1]/c d.txt", "odd [1]/sub/e.txt", "odd [1]/b.txt", "a.txt"]
    found = find_files([f"@{folder}/list"])
    assert [os.path.relpath(path.resolve(), tmp_path) for path in found] == expected
    monkeypatch.chdir(folder)
    assert find_files(["@list"])[1:3] == [Path("c d.txt"), Path("sub/e.txt")]
    (folder / "list").write_text("b.txt\ngone.txt\n")
    with pytest.raises(ValueError, match=r"list:2: input .*gone\.txt does not exist"):
        find_files([f"@{folder}/list"])
    with pytest.raises(FileNotFoundError, match="nolist"):
        find_files([f"@{folder}/nolist"])
    (folder / "list").write_text("# nothing\n")
    with pytest.raises(ValueError, match="list names no file"):
        find_files([f"@{folder}/list"])


@pytest.mark.parametrize(
    "name", ["a.jsonl.bz2", "a.zip", "a.tar.gz", "a.txt.xz", "a.parquet.gz", "a.tgz", "A.JSON.LZ4"]
)
def test_foreign_packings_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "b.txt")
    with pytest.raises(ValueError, match=rf"{name} is packed \(\.\w+.*\); repack it as \.jsonl"):
        find_files([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.json.xz"])
def test_lines_in_a_foreign_packing_are_not_passed_over(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "b.txt", f"sub/{name}")
    with pytest.raises(ValueError, match=rf"{name} is packed"):
        find_files([str(tmp_path)])


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.pyc")
    with pytest.raises(ValueError, match=r"input .*gone\.txt does not exist"):
        find_files([f"{tmp_path}/gone.txt"])
    for name in (str(tmp_path), f"{tmp_path}/*.txt"):
        with pytest.raises(ValueError, match="holds no text file"):
            find_files([name])


def test_a_plan_in_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(bytes(250))
    (tmp_path / "b.jsonl.gz").write_bytes(bytes(30))
    (tmp_path / "c.txt").write_bytes(bytes(20))
    (tmp_path / "d.txt").write_bytes(bytes(500))
    (tmp_path / "e.jsonl").write_bytes(b"")
    a, b, c, d, e = (str(path) for path in sorted(tmp_path.iterdir()))
    jobs = plan_jobs(find_files([f"{tmp_path}/*"]), job_bytes=100)
    assert jobs == [
        Job((Piece(a, 0, 100),), 100),
        Job((Piece(a, 100, 200),), 100),
        Job((Piece(a, 200, 250), Piece(b, 0, 30), Piece(c, 0, 20)), 100),
        Job((Piece(d, 0, 500),), 500),
        Job((Piece(e, 0, 0),), 0),
    ]
    assert plan_jobs([], job_bytes=100) == []


def test_row_groups_are_planned_by_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["text"] * 10, group_rows=2)
    size = path.stat().st_size
    (job,) = plan_jobs([path], job_bytes=size)
    assert job == Job((Piece(str(path), 0, 5),), size)
    jobs = plan_jobs([path], job_bytes=size * 2 // 5 + 1)
    assert [(job.pieces[0].begin, job.pieces[0].end) for job in jobs] == [(0, 2), (2, 4), (4, 5)]
    assert sum(job.num_bytes for job in jobs) == size
    assert len(plan_jobs([path], job_bytes=1)) == 5
    # What cannot be read, or holds nothing, is for the reader to tell.
    write_parquet(tmp_path / "empty.parquet", [])
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-1])
    for name, end in {"empty.parquet": 1, "cut.parquet": 0}.items():
        (job,) = plan_jobs([tmp_path / name], job_bytes=10)
        assert [(piece.begin, piece.end) for piece in job.pieces] in ([(0, end)], [(0, 0)])
        assert job.num_bytes == (tmp_path / name).stat().st_size


def test_the_digest_is_that_of_the_plan_wherever_it_lies(tmp_path: Path) -> None:
    first = tmp_path / "one"
    first.mkdir()
    (first / "a.jsonl").write_bytes(json_lines(["text"] * 20))
    (first / os.fsdecode(b"b\xff.txt")).write_bytes(b"text")
    shutil.copytree(first, tmp_path / "two")

    def digest(folder: str, job_bytes: int = 100) -> str:
        return plan_digest(plan_jobs(find_files([f"{tmp_path}/{folder}"]), job_bytes=job_bytes))

    assert digest("one") == digest("two") != digest("one", 101)
    # An interrupted run goes on only under the same digest: it must not change between versions.
    (tmp_path / "four").mkdir()
    (tmp_path / "four" / "é.jsonl").write_bytes(bytes(150))
    spelled = b'[100, [["\\u00e9.jsonl", 0, 100]]]\n[50, [["\\u00e9.jsonl", 100, 150]]]\n'
    assert digest("four") == hashlib.sha256(spelled).hexdigest()
    with (tmp_path / "two" / "a.jsonl").open("ab") as stream:
        stream.write(b"\n")
    assert digest("one") != digest("two")
    shutil.copytree(first, tmp_path / "three")
    (tmp_path / "three" / "a.jsonl").rename(tmp_path / "three" / "z.jsonl")
    assert digest("one") != digest("three")


# --- Properties ----------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
# Neither NUL nor a byte order mark, which are not the text's in a file of text.
PLAIN_TEXT = st.text(st.characters(exclude_characters="\0\ufeff", codec="utf-8"), max_size=30)
PACKINGS = st.sampled_from(list(PACKERS))


@st.composite
def line_files(draw: st.DrawFn) -> tuple[str, bytes, list[tuple[str, int]], int]:
    """Suffix, bytes, (text, line number) of its documents, and lines that are left out."""
    lines, expected, num_bad = [], [], 0
    for number in range(1, draw(st.integers(1, 8)) + 1):
        kind = draw(st.sampled_from(["text", "text", "text", "blank", "bad"]))
        if kind == "text":
            text = draw(TEXT)
            expected.append((text, number))
            lines.append(json.dumps({"text": text}, ensure_ascii=draw(st.booleans())))
        elif kind == "bad":
            lines.append(draw(st.sampled_from(["{", "7", "{}", '{"text": 1}'])))
            num_bad += 1
        else:
            lines.append(draw(st.sampled_from(["", " ", "\t\r"])))
    data = "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n\n"]))
    if not data:
        num_bad += 1  # the file is empty
    packing = draw(PACKINGS)
    return f".jsonl{packing}", PACKERS[packing](data.encode()), expected, num_bad


@st.composite
def corpora(draw: st.DrawFn) -> list[tuple[str, object, list[tuple[str, str]], int]]:
    """Files: name, contents, (text, place) of the documents, number of things left out."""
    files: list[tuple[str, object, list[tuple[str, str]], int]] = []
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["lines", "lines", "parquet", "text"]))
        if kind == "lines":
            suffix, data, expected, num_bad = draw(line_files())
            name = f"{number}{suffix}"
            files.append(
                (name, data, [(text, f"{name}:{line}") for text, line in expected], num_bad)
            )
        elif kind == "parquet":
            name = f"{number}.parquet"
            rows = draw(st.lists(st.none() | TEXT, max_size=12))
            found = [
                (text, f"{name}:row {row}") for row, text in enumerate(rows) if text is not None
            ]
            files.append((name, rows, found, rows.count(None) or not rows))
        else:
            packing = draw(PACKINGS)
            name, text = f"{number}.txt{packing}", draw(PLAIN_TEXT)
            files.append((name, PACKERS[packing](text.encode()), [(text, name)], 0))
    return files


def write(directory: Path, files: list[tuple[str, object, list[tuple[str, str]], int]]) -> None:
    for name, contents, _, _ in files:
        if isinstance(contents, bytes):
            (directory / name).write_bytes(contents)
        else:
            write_parquet(directory / name, contents)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(corpora(), st.integers(1, 400))
def test_any_plan_gives_every_document_once(
    files: list[tuple[str, object, list[tuple[str, str]], int]], job_bytes: int
) -> None:
    with TemporaryDirectory() as name:
        write(Path(name), files)
        counts = Counter[str]()
        found = documents(name, job_bytes=job_bytes, left_out=counts)
        assert [(document.text, os.path.relpath(document.source, name)) for document in found] == [
            document for _, _, expected, _ in files for document in expected
        ]
        assert counts.total() == sum(num_bad for _, _, _, num_bad in files)
        jobs = plan_jobs(find_files([name]), job_bytes=job_bytes)
        sizes = [os.path.getsize(path) for path in find_files([name])]
        assert sum(job.num_bytes for job in jobs) == sum(sizes)


@settings(deadline=None, max_examples=80)
@given(corpora(), st.integers(1, 400))
def test_reading_goes_on_after_any_document(
    files: list[tuple[str, object, list[tuple[str, str]], int]], job_bytes: int
) -> None:
    def read(job: Job, counts: Counter[str], **start: object) -> list[tuple[Document, int]]:
        stream = read_documents(
            job.pieces, text_field="text", on_error="skip", left_out=counts, **start
        )
        return [(document, counts.total()) for document in stream]

    with TemporaryDirectory() as name:
        write(Path(name), files)
        for job in plan_jobs(find_files([name]), job_bytes=job_bytes):
            counts = Counter[str]()
            whole = read(job, counts)
            for number, (document, num_left_out) in enumerate(whole, start=1):
                rest = Counter[str]()
                again = [found for found, _ in read(job, rest, start=document.next)]
                expected = [found for found, _ in whole[number:]]
                assert [d._replace(origin=None) for d in again] == [
                    d._replace(origin=None) for d in expected
                ]
                assert [d.source for d in again] == [d.source for d in expected]
                assert num_left_out + rest.total() == counts.total()
