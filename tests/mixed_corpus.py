"""Real text in every format that `preprocess` reads, and a tokenizer of it."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

_SOURCES = ("argparse.py", "ast.py", "calendar.py", "cgi.py", "cmd.py", "codecs.py", "copy.py")


@dataclass(frozen=True)
class MixedCorpus:
    """Files, the documents in them in order, and a SentencePiece tokenizer."""

    directory: Path
    texts: Sequence[str]

    @property
    def files(self) -> list[str]:
        """Plain lines, gzip, zstd, parquet, text."""
        names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.md")
        return [str(self.directory / "input" / name) for name in names]

    @property
    def tokenizer(self) -> str:
        return str(self.directory / "tokenizer")


def make_mixed_corpus(directory: Path) -> MixedCorpus:
    """A few hundred paragraphs of Python, some of them with letters beyond ASCII."""
    texts = _paragraphs()
    (directory / "input").mkdir()
    corpus = MixedCorpus(directory, texts)
    plain, packed, frames, table, text = map(Path, corpus.files)
    quarter = len(texts) // 4
    plain.write_bytes(_lines(texts[:quarter]))
    packed.write_bytes(gzip.compress(_lines(texts[quarter : 2 * quarter]), mtime=0))
    frames.write_bytes(zstandard.compress(_lines(texts[2 * quarter : 3 * quarter])))
    column = pyarrow.table(
        {"id": range(3 * quarter, len(texts) - 1), "text": texts[3 * quarter : -1]}
    )
    pyarrow.parquet.write_table(column, table, row_group_size=40)
    text.write_bytes(texts[-1].encode())
    train_tokenizer(TokenizerConfig([corpus.files[0]], output_dir=corpus.tokenizer, vocab_size=400))
    return corpus


def _paragraphs() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / name for name in _SOURCES if (library / name).exists()]
    texts = [text for source in sources for text in source.read_text("utf-8").split("\n\n")]
    marks = ("", "é", "汉字 ", "👩‍💻", "\t\r\n", "e\u0301")
    return [f"{marks[n % len(marks)]}{text}\n" for n, text in enumerate(texts) if text.strip()]


def _lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
