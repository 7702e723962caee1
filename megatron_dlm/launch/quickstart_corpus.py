"""The embedded corpus of quickstart and toy studies: the sources of Python's standard library."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import orjson

# Every fifth file is held out.
_HOLD_OUT_EVERY = 5
# Installed by others, made for one machine, tests that some packages leave out, tables of numbers.
_NOT_TEXT = re.compile(
    r"(^|/)(site-packages|dist-packages|config-[^/]*|_sysconfigdata[^/]*|test|tests|idle_test|"
    r"encodings|pydoc_data|__pycache__)(/|$)"
)


def write_corpus(train: Path, valid: Path, *, packages: bool = False) -> None:
    """Two .jsonl files from disjoint modules of the standard library, sorted by name.

    Top-level modules only (about 2 million tokens of a vocabulary of 512 to train on), or with
    those inside of `packages` too (4 million). Raises ValueError without sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.rglob("*.py") if packages else library.glob("*.py"))
    if packages:
        files = [f for f in files if not _NOT_TEXT.search(f.relative_to(library).as_posix())]
    if len(files) < _HOLD_OUT_EVERY:
        raise ValueError(
            f"{library} holds {len(files)} .py files; the quickstart needs a Python whose standard "
            "library lies there as source"
        )
    held_out = files[_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY]
    _write(train, [path for path in files if path not in held_out])
    _write(valid, held_out)


def _write(output: Path, files: Sequence[Path]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("wb") as lines:
        for path in files:
            for text in _definitions(path.read_text(encoding="utf-8", errors="replace")):
                document = {"text": text, "file": path.name}
                lines.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
    os.replace(temporary, output)


def _definitions(source: str) -> list[str]:
    """Top-level functions and classes: two blank lines lie between them.

    As documents they are small enough for a small budget of unique tokens to hold many.
    """
    return [f"{part.strip()}\n" for part in re.split(r"\n\n\n+", source) if part.strip()]
