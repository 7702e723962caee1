"""Learn a SentencePiece vocabulary from text; the directory is written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from rich.console import Console

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.config.tokenizer_metadata import METADATA_FILE
from megatron_dlm.data.readers import find_files, read_documents
from megatron_dlm.data.tokenizer import MODEL_FILE, load_tokenizer, normalize

_PAD, _BOS, _EOD, _UNKNOWN, _MASK = range(5)
# A longer line is learnt from in pieces; SentencePiece would drop it.
_SENTENCE_CHARACTERS = 2048
# Text kept aside to measure bytes per token on.
_PROBE_CHARACTERS = 1_000_000


def train_tokenizer(config: TokenizerConfig) -> None:
    """`megatron-dlm tokenizer`: train, measure and publish; prints what was made and where."""
    console = Console(stderr=True)
    output = Path(config.output_dir)
    _check_output(output)
    files = find_files(config.input)
    with console.status(f"reading {len(files)} files"):
        sentences, probe = _sample(files, config)
    if not sentences:
        raise ValueError(f"input holds no text: {', '.join(config.input)}; name files with text")
    with console.status(f"training {config.model_type} on {len(sentences):,} lines"):
        model = _train_model(sentences, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        temporary.chmod(0o755)
        bytes_per_token = _write(temporary, model, config.vocab_size, probe)
        _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"tokenizer: {config.vocab_size} tokens, {bytes_per_token:.2f} bytes per token: {output}")


def _sample(files: list[Path], config: TokenizerConfig) -> tuple[list[str], list[str]]:
    """A uniform sample of lines (reservoir, Vitter 1985, algorithm R), and some whole documents."""
    generator = random.Random(config.seed)
    sentences: list[str] = []
    probe: list[str] = []
    room, seen = _PROBE_CHARACTERS, 0
    for document in read_documents(files, text_field=config.text_field):
        if room > 0:
            probe.append(document.text[:room])
            room -= len(document.text)
        for sentence in _sentences(document.text):
            seen += 1
            if len(sentences) < config.max_sentences:
                sentences.append(sentence)
            elif (place := generator.randrange(seen)) < config.max_sentences:
                sentences[place] = sentence
    return sentences, probe


def _sentences(text: str) -> Iterator[str]:
    """Non-blank lines; newline and tab are pieces of their own, and never inside another."""
    for line in re.split(r"[\n\t]+", normalize(text).replace("\0", "")):
        if line.strip():
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]


def _train_model(sentences: list[str], config: TokenizerConfig) -> bytes:
    """The serialized model; its settings keep every blank, so that code survives a round trip."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            # Control pieces: no text is ever encoded to them, "<mask>" least of all.
            control_symbols=["<mask>"],
            pad_id=_PAD,
            bos_id=_BOS,
            eos_id=_EOD,
            unk_id=_UNKNOWN,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eod>",
            unk_piece="<unk>",
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, config) from None
    return model.getvalue()


def _explain(error: RuntimeError, config: TokenizerConfig) -> ValueError:
    """SentencePiece's size complaints in our words."""
    message = str(error)
    too_high = re.search(r"too high.*<= (\d+)", message)
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_high:
        return ValueError(
            f"vocab_size {config.vocab_size} is too large for this text, which supports at most "
            f"{too_high[1]}; lower vocab_size or give more text"
        )
    if too_low:
        return ValueError(
            f"vocab_size {config.vocab_size} is too small: bytes and single characters of this "
            f"text alone take {too_low[1]}; raise vocab_size"
        )
    return ValueError(f"SentencePiece could not train on this text: {message}")


def _write(directory: Path, model: bytes, vocab_size: int, probe: list[str]) -> float:
    """Write the model and its card; returns bytes per token, measured on the probe."""
    (directory / MODEL_FILE).write_bytes(model)
    card: dict[str, Any] = {
        "kind": "sentencepiece",
        "vocab_size": vocab_size,
        "pad_id": _PAD,
        "bos_id": _BOS,
        "eod_id": _EOD,
        "mask_id": _MASK,
        "special_ids": [_PAD, _BOS, _EOD, _UNKNOWN, _MASK],
        "sha256": hashlib.sha256(model).hexdigest(),
        "bytes_per_token": 0.0,
        "normalization": "NFC",
    }
    path = directory / METADATA_FILE
    path.write_text(json.dumps(card), encoding="utf-8")
    encoded = load_tokenizer(directory).encode_batch(probe)
    num_bytes = sum(len(text.encode()) for text in probe)
    card["bytes_per_token"] = round(num_bytes / sum(len(ids) for ids in encoded), 4)
    path.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return float(card["bytes_per_token"])


def _check_output(output: Path) -> None:
    """An older tokenizer may be replaced; nothing else may."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output_dir {output} is a file; name a directory")
    others = sorted({path.name for path in output.iterdir()} - {MODEL_FILE, METADATA_FILE})
    if others:
        raise ValueError(
            f"output_dir {output} holds other files ({', '.join(others[:3])}); name a new directory"
        )


def _publish(temporary: Path, output: Path) -> None:
    """Rename into place; an older tokenizer is moved aside first and then removed."""
    if not output.exists():
        os.replace(temporary, output)
        return
    print(f"replacing the tokenizer in {output}", file=sys.stderr)
    aside = temporary.with_name(temporary.name + ".old")
    os.replace(output, aside)
    os.replace(temporary, output)
    shutil.rmtree(aside)
