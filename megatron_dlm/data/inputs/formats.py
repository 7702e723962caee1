"""What the ending of a file's name says: how it is packed and how its documents lie in it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from megatron_dlm.data.inputs.byte_streams import CODECS

_LINE_SUFFIXES = frozenset((".jsonl", ".ndjson"))
# What a directory is searched for besides; a text file named by itself may have any other ending.
_TEXT_SUFFIXES = frozenset((
    ".c", ".cc", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json",
    ".md", ".py", ".pyi", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml",
    ".yml",
))  # fmt: skip
# Nothing here reads these.
_FOREIGN_SUFFIXES = frozenset((
    ".7z", ".arrow", ".br", ".bz2", ".feather", ".lz4", ".lzma", ".rar", ".tar", ".tbz2", ".tgz",
    ".txz", ".xz", ".zip",
))  # fmt: skip


class Format(NamedTuple):
    """How to read a file."""

    layout: Literal["lines", "parquet", "text"]
    """One JSON object per line, a row per document, or the whole file as one document."""
    codec: str | None
    """Suffix of the compression, of `CODECS`."""


def format_of(name: str) -> Format:
    """Format of a file by its name.

    Packed `.json.gz` is line-delimited, as C4 and Dolma name their files; a plain `.json` is a text
    like the sources around it. Raises ValueError for an archive or a compression that nothing here
    reads.
    """
    inner, suffix = _split(name)
    codec = suffix if suffix in CODECS else None
    if codec is not None:
        _, suffix = _split(inner)
    if suffix in _FOREIGN_SUFFIXES or (suffix == ".parquet" and codec is not None):
        raise ValueError(
            f"input {name} is packed ({suffix if codec is None else suffix + codec}); repack it as "
            ".jsonl, .jsonl.zst, .jsonl.gz, .parquet or plain text"
        )
    if suffix == ".parquet":
        return Format("parquet", None)
    if suffix in _LINE_SUFFIXES or (suffix == ".json" and codec is not None):
        return Format("lines", codec)
    return Format("text", codec)


def is_searched_for(name: str) -> bool:
    """Whether a directory's file of this name is input: text, lines or parquet, packed or not.

    True also for line-delimited JSON in a compression that `format_of` refuses: an error is better
    than a corpus that is silently passed over.
    """
    inner, suffix = _split(name)
    if suffix in CODECS:
        _, suffix = _split(inner)
    elif suffix in _FOREIGN_SUFFIXES:
        return _split(inner)[1] in _LINE_SUFFIXES | {".json"}
    return suffix in _TEXT_SUFFIXES or suffix in _LINE_SUFFIXES or suffix == ".parquet"


def _split(name: str) -> tuple[str, str]:
    """Name without its last suffix, and that suffix in small letters; `.profile` has none."""
    stem, dot, suffix = name.rpartition(".")
    if not stem or stem.endswith("/") or "/" in suffix:
        return name, ""
    return stem, f"{dot}{suffix.lower()}"
