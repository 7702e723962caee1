"""Documents come out whole and in order; what cannot be read is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dlm.data.readers import find_files, read_documents


def texts(*inputs: Path, text_field: str = "text") -> list[str]:
    files = find_files([str(path) for path in inputs])
    return [document.text for document in read_documents(files, text_field=text_field)]


def test_jsonl_and_plain_text(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in ("one\ntwo", "é \u2028 ü", "")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "b.py").write_bytes(b"x = 1\r\n\ty\n")
    found = texts(tmp_path / "a.jsonl", tmp_path / "b.py", text_field="body")
    assert found == ["one\ntwo", "é \u2028 ü", "", "x = 1\r\n\ty\n"]


def test_progress_bytes_sum_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "é"}\n{"text": "b"}')
    documents = list(read_documents([path], text_field="text"))
    assert sum(document.num_bytes for document in documents) == path.stat().st_size
    assert [document.source for document in documents] == [f"{path}:1", f"{path}:2"]


def test_directories_and_globs_are_sorted_and_unique(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "sub/d.pyc", "e.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["a.py", "b.txt", "sub/c.md"]
    assert texts(tmp_path / "*.txt", tmp_path) == ["b.txt", "a.py", "sub/c.md"]
    assert texts(tmp_path / "**" / "*.md", tmp_path / "e.bin") == ["sub/c.md", "e.bin"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:2: not valid JSON"),
        (b"[1]", r"a\.jsonl:2: holds list, not an object"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:2: 'text' is missing; the keys are body, id"),
        (b'{"text": null}', r"a\.jsonl:2: 'text' is not a string"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 0xff at offset 10\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt does not exist"):
        texts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="holds no text file"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="holds no text file"):
        texts(tmp_path / "*.txt")
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is packed \(\.gz\)"):
        texts(tmp_path / "a.jsonl.gz")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 \(byte 0xe9 at offset 3\)"):
        texts(tmp_path / "latin.txt")
