"""The plan of the work: which files, in which order, cut into jobs of about one size."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_dlm.data.inputs.documents import Piece
from megatron_dlm.data.inputs.formats import format_of, is_searched_for
from megatron_dlm.data.inputs.parquet_reader import rows_of_groups


@dataclass(frozen=True)
class Job:
    """The pieces that one worker turns into shards."""

    pieces: tuple[Piece, ...]
    num_bytes: int
    """Bytes of the input as they lie on disk; over all jobs they sum to the files' sizes."""


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Input files in a fixed order, each once.

    An input is a file; a directory, searched for text, .jsonl and .parquet without following links
    to other directories; a glob (`**` for any depth); or `@LIST`, a file that names one of these
    per line, relative to its own directory; blank lines and lines that begin with # say nothing.
    A directory and a glob give their files sorted and pass over names that begin with a dot.

    Raises ValueError for an input that gives no file and for a file that nothing here reads.
    """
    found: dict[str, Path] = {}
    for name in inputs:
        for path in _expand_list(name[1:]) if name.startswith("@") else _expand(name):
            found.setdefault(os.path.realpath(path), path)
    for path in found.values():
        format_of(str(path))
    return list(found.values())


def plan_jobs(files: Iterable[Path], *, job_bytes: int) -> list[Job]:
    """Cut and group the files, in order, into jobs of about `job_bytes` bytes on disk.

    Plain lines are cut anywhere, parquet between row groups, packed files and text nowhere. The
    plan depends on names, sizes and parquet footers only.
    """
    assert job_bytes > 0, job_bytes
    jobs: list[Job] = []
    pieces: list[Piece] = []
    num_bytes = 0
    for piece, size in _pieces(files, job_bytes):
        if pieces and num_bytes + size > job_bytes:
            jobs.append(Job(tuple(pieces), num_bytes))
            pieces, num_bytes = [], 0
        pieces.append(piece)
        num_bytes += size
    if pieces:
        jobs.append(Job(tuple(pieces), num_bytes))
    return jobs


def plan_digest(jobs: Sequence[Job]) -> str:
    """sha256 of the plan: files by name without folder and in order, ranges and sizes."""
    digest = hashlib.sha256()
    for job in jobs:
        names = [(os.path.basename(piece.path), piece.begin, piece.end) for piece in job.pieces]
        # A name may hold any byte, which JSON spells in ASCII.
        digest.update(json.dumps([job.num_bytes, names]).encode("ascii") + b"\n")
    return digest.hexdigest()


def _pieces(files: Iterable[Path], job_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of at most `job_bytes` where the format allows, with their bytes on disk."""
    for file in files:
        path = str(file)
        size = os.stat(path).st_size
        layout, codec = format_of(path)
        if layout == "lines" and codec is None and size > 0:
            for begin in range(0, size, job_bytes):
                end = min(begin + job_bytes, size)
                yield Piece(path, begin, end), end - begin
        elif layout == "parquet":
            yield from _parquet_pieces(path, size, job_bytes)
        else:
            yield Piece(path, 0, size), size


def _parquet_pieces(path: str, size: int, job_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Runs of row groups; the file's bytes are shared out by rows."""
    rows = rows_of_groups(path)
    num_rows = sum(rows)
    if num_rows == 0:
        yield Piece(path, 0, len(rows)), size
        return
    # Byte of the file at which a row group ends, as if all rows were of one size.
    ends = [size * rows_so_far // num_rows for rows_so_far in accumulate(rows)]
    begin = begin_byte = 0
    for group in range(1, len(ends) + 1):
        if group == len(ends) or ends[group] - begin_byte > job_bytes:
            yield Piece(path, begin, group), ends[group - 1] - begin_byte
            begin, begin_byte = group, ends[group - 1]


def _expand_list(name: str) -> list[Path]:
    """Files that the lines of a list name."""
    found: list[Path] = []
    with open(name, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            try:
                found += _expand(entry, os.path.dirname(name))
            except ValueError as error:
                raise ValueError(f"{name}:{number}: {error}") from None
    if not found:
        raise ValueError(f"list {name} names no file; write one file, directory or glob per line")
    return found


def _expand(name: str, folder: str = "") -> list[Path]:
    """Files that one input names; relative to `folder`."""
    name = os.path.expanduser(name)
    path = Path(folder, name)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _search(path)
    elif glob.has_magic(name):
        matches = glob.glob(os.path.join(glob.escape(folder), name), recursive=True)
        found = [Path(match) for match in matches if os.path.isfile(match)]
    else:
        raise ValueError(f"input {path} does not exist; name a file, a directory or a glob")
    if not found:
        raise ValueError(
            f"input {path} holds no text file; name a file, a glob or a directory with text"
        )
    return sorted(found, key=lambda file: file.parts)


def _search(directory: Path) -> list[Path]:
    """Input files at any depth, hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(directory, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if is_searched_for(name) and not name.startswith(".")
        ]
    return [path for path in found if path.is_file()]


def _raise(error: OSError) -> None:
    """A folder that cannot be listed must not be passed over."""
    raise error
