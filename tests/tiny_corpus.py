"""A few thousand tokens of real text, tokenized and written as shards by the package itself."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.config.commands import PreprocessConfig, TokenizerConfig
from megatron_dlm.data.preprocessing.preprocess import preprocess
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

VOCAB_SIZE = 400
_SOURCES = (
    "bisect.py",
    "heapq.py",
    "keyword.py",
    "this.py",
    "colorsys.py",
    "shelve.py",
    "sched.py",
)


@dataclass(frozen=True)
class TinyCorpus:
    """Where the files lie; shards are named by prefix, as in `data.train`."""

    directory: Path

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer"

    @property
    def train(self) -> Path:
        return self.directory / "text"

    @property
    def valid(self) -> Path:
        return self.directory / "text_valid"

    @property
    def other(self) -> Path:
        """A second training shard."""
        return self.directory / "other"


def make_tiny_corpus(directory: Path) -> TinyCorpus:
    """Tokenizer, a training and a validation shard, and a second training shard."""
    corpus = TinyCorpus(directory)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / name for name in _SOURCES]
    text = _write_paragraphs(sources, directory / "text.jsonl")
    train_tokenizer(
        TokenizerConfig([str(text)], output_dir=str(corpus.tokenizer), vocab_size=VOCAB_SIZE)
    )
    tokenizer = str(corpus.tokenizer)
    preprocess(PreprocessConfig([str(text)], str(corpus.train), tokenizer, validation_fraction=0.2))
    preprocess(PreprocessConfig([str(library / "textwrap.py")], str(corpus.other), tokenizer))
    return corpus


def _write_paragraphs(sources: list[Path], path: Path) -> Path:
    """One document per paragraph, so that there is an order of documents to get wrong."""
    paragraphs = [
        part for source in sources for part in source.read_text().split("\n\n") if part.strip()
    ]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
    return path
