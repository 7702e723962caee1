"""Prompts: read from arguments, files and standard input, and turned into tokens."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from megatron_dlm.config.generation_commands import GenerateConfig
from megatron_dlm.data.tokenization.tokenizer import Tokenizer

_GAP = re.compile(r"<mask:(\d+)>")


@dataclass(frozen=True)
class Prompt:
    """One text to continue, or with gaps to fill."""

    text: str
    tokens: list[int]


def read_prompts(config: GenerateConfig) -> list[str]:
    """All prompts of the configuration in order; ValueError where there is none."""
    texts = list(config.prompt)
    if config.prompts_file is not None and config.prompts_file != "-":
        path = Path(config.prompts_file)
        try:
            with path.open(encoding="utf-8") as stream:
                texts += _parse(stream, path.name, is_json=path.suffix == ".jsonl")
        except UnicodeDecodeError:
            raise ValueError(f"prompts_file {path} is not a text file in UTF-8") from None
    elif config.prompts_file == "-" or (not texts and not sys.stdin.isatty()):
        texts += _parse(sys.stdin, "standard input", is_json=False)
    if not texts:
        raise ValueError("there is no prompt; give prompt or prompts_file, or pipe lines in")
    return texts


def _parse(stream: TextIO, name: str, *, is_json: bool) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        yield _prompt_of(line, f"{name}, line {number}") if is_json else line.rstrip("\r\n")


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'{place}: expected a JSON object with a text under "prompt"')
    return prompt


def encode_template(text: str, tokenizer: Tokenizer, mask_id: int) -> Prompt:
    """The tokens of a text with `<mask:N>` gaps, N masks each; ValueError where there is none."""
    pieces = _GAP.split(text)  # text, count, text, count, ..., text
    counts = [int(count) for count in pieces[1::2]]
    if not counts or 0 in counts:
        raise ValueError(f"the prompt {text[:40]!r} has no gap to fill; write one as <mask:8>")
    tokens: list[int] = []
    for piece, count in zip(pieces[::2], [*counts, 0], strict=True):
        tokens += tokenizer.encode(piece) + [mask_id] * count
    return Prompt(text, tokens)


def pad_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 [b, P] with `filler` before the shorter rows, and valid bool [b, P]."""
    width = max(map(len, rows))
    tokens = [[filler] * (width - len(row)) + list(row) for row in rows]
    valid = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    shape = (len(rows), width)
    return (
        torch.tensor(tokens, dtype=torch.int64).reshape(shape),
        torch.tensor(valid, dtype=torch.bool).reshape(shape),
    )
