"""The command `megatron-dlm preprocess`: text files to shards, streaming."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.readers import Document, find_files, read_documents
from megatron_dlm.data.shards import ShardWriter
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer

# A batch is encoded at once on all cores; memory holds a few copies of it.
_BATCH_DOCUMENTS = 4096
_BATCH_CHARACTERS = 8_000_000


@dataclass
class _Counts:
    documents: int = 0
    skipped: int = 0


def preprocess(config: PreprocessConfig) -> None:
    """Write `<output_prefix>`, and `<output_prefix>_valid` where a share is held out."""
    tokenizer = load_tokenizer(config.tokenizer)
    files = find_files(config.input)
    prefixes = [config.output_prefix]
    if config.validation_fraction > 0:
        prefixes.append(f"{config.output_prefix}_valid")
    counts = _Counts()
    with ExitStack() as stack:
        writers = [stack.enter_context(_open_writer(prefix, tokenizer)) for prefix in prefixes]
        documents = _with_progress(
            read_documents(files, text_field=config.text_field), files, stack
        )
        for batch in _batches(documents, config.minimum_characters, counts):
            _write_batch(batch, tokenizer, writers, config)
        _check_not_empty(writers, counts, config)
        for writer in writers:
            writer.publish([str(path) for path in files])
    for writer in writers:
        print(
            f"shard: {writer.num_tokens:,} tokens, {writer.num_documents:,} documents: "
            f"{writer.prefix}.bin, .idx, .manifest.json"
        )
    if counts.skipped:
        print(
            f"skipped {counts.skipped:,} documents shorter than {config.minimum_characters} "
            "characters"
        )


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so the choice survives a growing corpus."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2.0**64)


def _open_writer(prefix: str, tokenizer: Tokenizer) -> ShardWriter:
    return ShardWriter(
        prefix,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        eod_id=tokenizer.eod_id,
        mask_id=tokenizer.mask_id,
    )


def _with_progress(
    documents: Iterable[Document], files: list[Path], stack: ExitStack
) -> Iterator[Document]:
    """Pass the documents on and show bytes read, rate and time left on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    progress = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    total_bytes = sum(path.stat().st_size for path in files)
    task = progress.add_task("encoding", total=total_bytes, documents=0)
    for number, document in enumerate(documents, start=1):
        yield document
        progress.update(task, advance=document.num_bytes, documents=number)


def _batches(
    documents: Iterable[Document], minimum_characters: int, counts: _Counts
) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for document in documents:
        if len(document.text) < minimum_characters:
            counts.skipped += 1
            continue
        counts.documents += 1
        batch.append(document.text)
        num_characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _write_batch(
    texts: list[str], tokenizer: Tokenizer, writers: list[ShardWriter], config: PreprocessConfig
) -> None:
    encoded = tokenizer.encode_batch(texts)
    if config.append_eod:
        for ids in encoded:
            ids.append(tokenizer.eod_id)
    held_out = [in_validation(text, config.validation_fraction) for text in texts]
    for writer, side in zip(writers, (False, True), strict=False):
        chosen = [ids for ids, held in zip(encoded, held_out, strict=True) if held == side]
        lengths = [len(ids) for ids in chosen]
        tokens = np.fromiter((i for ids in chosen for i in ids), dtype=np.int64, count=sum(lengths))
        writer.add_documents(tokens, lengths)


def _check_not_empty(writers: list[ShardWriter], counts: _Counts, config: PreprocessConfig) -> None:
    if counts.documents == 0:
        raise ValueError(
            f"input holds no document of at least {config.minimum_characters} characters "
            f"({counts.skipped} are shorter); lower minimum_characters or name other files"
        )
    for writer in writers:
        if writer.num_documents == 0:
            raise ValueError(
                f"no document fell to {writer.prefix}: {counts.documents} documents are too few "
                f"for validation_fraction {config.validation_fraction}; change it or give more"
            )
