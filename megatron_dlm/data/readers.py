"""Text documents from files: one per line of a .jsonl file, one per file of anything else."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

# What a directory is searched for; a file named by itself may have any other ending.
_TEXT_SUFFIXES = frozenset((
    ".c", ".cc", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json",
    ".jsonl", ".md", ".py", ".pyi", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml",
    ".yaml", ".yml",
))  # fmt: skip
_PACKED_SUFFIXES = frozenset((".bz2", ".gz", ".parquet", ".xz", ".zip", ".zst"))


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str
    """File, with the line number for .jsonl."""
    num_bytes: int
    """Bytes of the file that it took, for progress."""


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Files, directories (searched for text) and globs -> files, each once, in a fixed order."""
    found: dict[Path, None] = {}
    for name in inputs:
        paths = _expand(name)
        if not paths:
            raise ValueError(
                f"input {name} holds no text file; name a file, a glob or a directory with text"
            )
        found.update(dict.fromkeys(paths))
    for path in found:
        if path.suffix in _PACKED_SUFFIXES:
            raise ValueError(f"input {path} is packed ({path.suffix}); unpack it to .jsonl or text")
    return list(found)


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
        return sorted(file for file in files if file.is_file())
    if not glob.has_magic(name):
        raise ValueError(f"input {name} does not exist; name a file, a directory or a glob")
    matches = (Path(match) for match in glob.glob(str(path), recursive=True))
    return sorted(match for match in matches if match.is_file())


def read_documents(files: Iterable[Path], *, text_field: str) -> Iterator[Document]:
    """Stream the documents of all files; memory holds one document at a time."""
    for path in files:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field)
        else:
            data = path.read_bytes()
            yield Document(_decode(data, str(path)), str(path), len(data))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                _decode(line, source)  # names the bad byte where that is the reason
                raise ValueError(f"{source}: not valid JSON ({error}); repair the line") from None
            yield Document(_text_of(record, text_field, source), source, len(line))


def _text_of(record: object, text_field: str, source: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(
            f"{source}: holds {type(record).__name__}, not an object; every line must be an object "
            f"with the key {text_field!r}"
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        state = "is not a string" if text_field in record else "is missing"
        raise ValueError(
            f"{source}: {text_field!r} {state}; the keys are {', '.join(record)}: set text_field"
        )
    return text


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it to UTF-8 or leave it out"
        ) from None
