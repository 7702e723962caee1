"""The command `megatron-dlm tokenizer`: train or adopt; a directory, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.config.tokenizer_metadata import METADATA_FILE, MODEL_FILES
from megatron_dlm.data.inputs.documents import Document
from megatron_dlm.data.inputs.input_plan import find_files, plan_jobs
from megatron_dlm.data.inputs.readers import read_documents
from megatron_dlm.data.tokenization.encoder import open_encoder
from megatron_dlm.data.tokenization.sentencepiece_training import SentenceSample, train_model
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, open_source
from megatron_dlm.data.tokenization.tokenizer_adoption import adopt, with_multiple
from megatron_dlm.data.tokenization.tokenizer_report import MeasuringSample, bytes_per_token, report
from megatron_dlm.data.tokenization.tokenizer_source import (
    CONFIG_FILES,
    TokenizerSource,
    read_source,
    trained_source,
)
from megatron_dlm.runtime.processes import num_cores

# int32 [vocab_size]: UTF-8 bytes of text that each id stands for.
TOKEN_BYTES_FILE = "token_bytes.npy"

_FILES = {*MODEL_FILES.values(), *CONFIG_FILES, METADATA_FILE, TOKEN_BYTES_FILE}


def train_tokenizer(config: TokenizerConfig) -> None:
    """Train a tokenizer or adopt `config.existing`, measure and publish it; prints what was made.

    Raises ValueError for text, sizes and names that do not go together; then nothing is written.
    """
    output = Path(config.output_dir)
    _check_output(output)
    left_out: Counter[str] = Counter()
    sample = MeasuringSample()
    if config.existing is None:
        source = _train(config, sample, left_out)
    else:
        source = adopt(read_source(Path(config.existing)), config)
        for document in _documents(config, left_out, sample):
            sample.add(document)
        _check_text(bool(sample.texts) or not config.input, config)
    tokenizer = open_source(source)
    encoder = open_encoder(tokenizer, "auto", num_threads=num_cores())
    measured = bytes_per_token(encoder, sample.texts)
    metadata = replace(source.metadata, bytes_per_token=measured.get("all"))
    _publish(replace(source, metadata=metadata), tokenizer, output)
    Console().print(report(tokenizer, encoder, measured))
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
        print(f"left out: {reasons}")
    average = f", {measured['all']:.2f} bytes per token" if measured else ""
    print(f"tokenizer: {metadata.vocab_size} tokens{average}: {output}")


def _train(
    config: TokenizerConfig, sample: MeasuringSample, left_out: Counter[str]
) -> TokenizerSource:
    console = Console(stderr=True)
    drawn = SentenceSample(config.max_sentences, config.seed)
    with console.status("reading"):
        for document in _documents(config, left_out):
            sample.add(document)
            drawn.add(document.text)
    _check_text(bool(drawn.sentences), config)
    with console.status(f"training {config.model_type} on {len(drawn.sentences):,} lines"):
        model = train_model(drawn.sentences, config)
    source = trained_source(model, mask_token=config.mask_token)
    return with_multiple(source, config.vocab_size_divisible_by)


def _documents(
    config: TokenizerConfig, left_out: Counter[str], sample: MeasuringSample | None = None
) -> Iterator[Document]:
    """All documents of the input; with a sample only those of the kinds that it has room for."""
    jobs = plan_jobs(find_files(config.input), job_bytes=sys.maxsize)
    for piece in (piece for job in jobs for piece in job.pieces):
        if sample is not None and not sample.has_room(piece.path):
            continue
        for document in read_documents(
            [piece], text_field=config.text_field, on_error=config.on_error, left_out=left_out
        ):
            yield document
            if sample is not None and not sample.has_room(piece.path):
                break


def _check_text(has_text: bool, config: TokenizerConfig) -> None:
    if not has_text:
        raise ValueError(f"input holds no text: {', '.join(config.input)}; name files with text")


def _check_output(output: Path) -> None:
    """An older tokenizer may be replaced; nothing else may."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output_dir {output} is a file; name a directory")
    others = sorted({path.name for path in output.iterdir()} - _FILES)
    if others:
        raise ValueError(
            f"output_dir {output} holds other files ({', '.join(others[:3])}); name a new directory"
        )


def _publish(source: TokenizerSource, tokenizer: Tokenizer, output: Path) -> None:
    """Write beside and rename into place; an older tokenizer is moved aside, then removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp: who may read the tokenizer is for the user's umask to say.
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        for name, content in source.files.items():
            (temporary / name).write_bytes(content)
        np.save(temporary / TOKEN_BYTES_FILE, tokenizer.token_bytes())
        source.metadata.write(temporary)
        _rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, output: Path) -> None:
    if not output.exists():
        os.replace(temporary, output)
        return
    print(f"replacing the tokenizer in {output}", file=sys.stderr)
    aside = temporary.with_name(temporary.name + ".old")
    os.replace(output, aside)
    os.replace(temporary, output)
    shutil.rmtree(aside)
