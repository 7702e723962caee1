"""Take over an existing tokenizer: add a mask token and unused ids, leave the ids of text alone."""

from __future__ import annotations

import json
from dataclasses import replace

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.huggingface_model import append_special_tokens
from megatron_dlm.data.tokenization.sentencepiece_model import SpecialKind, append_special_pieces
from megatron_dlm.data.tokenization.tokenizer_source import (
    CONFIG_FILES,
    TokenizerSource,
    special_names,
)


def adopt(source: TokenizerSource, config: TokenizerConfig) -> TokenizerSource:
    """The tokenizer with what `config` asks for; text keeps its ids.

    Only the letters of an `eod_token` that was text so far are spelt in other tokens. Raises
    ValueError for a second mask token, for names that are taken and for an `eod_token` that has no
    place of its own in the tokenizer.
    """
    if config.eod_token is not None:
        source = _with_eod(source, config.eod_token)
    if config.add_mask_token:
        source = _with_mask(source, config.mask_token)
    return with_multiple(source, config.vocab_size_divisible_by)


def with_multiple(source: TokenizerSource, divisor: int) -> TokenizerSource:
    """The tokenizer with unused ids after all others, so that its size is a multiple of `divisor`.

    No text gives them and they stand for none.
    """
    size = source.metadata.vocab_size
    names = [f"<unused_{token}>" for token in range(size, -(-size // divisor) * divisor)]
    return _append(source, names, "unused") if names else source


def _with_eod(source: TokenizerSource, name: str) -> TokenizerSource:
    names = special_names(source)
    if name not in names:
        raise ValueError(
            f"eod_token {name} is no special token of {source.origin}; it has "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    metadata = source.metadata
    special = tuple(sorted({*metadata.special_ids, names[name]}))
    metadata = replace(metadata, eod_id=names[name], special_ids=special)
    return replace(source, metadata=metadata, files=_named(source, "eos_token", name))


def _with_mask(source: TokenizerSource, name: str) -> TokenizerSource:
    metadata = source.metadata
    if metadata.mask_id is not None:
        found = {token: text for text, token in special_names(source).items()}[metadata.mask_id]
        raise ValueError(
            f"{source.origin} has the mask token {found} (id {metadata.mask_id}) already; leave "
            "out add_mask_token"
        )
    mask_id = metadata.vocab_size
    source = _append(source, [name], "control")
    metadata = replace(source.metadata, mask_id=mask_id)
    return replace(source, metadata=metadata, files=_named(source, "mask_token", name))


def _named(source: TokenizerSource, key: str, name: str) -> dict[str, bytes]:
    """The files, where transformers' own say too which token has the role."""
    files = {**source.files}
    for file in CONFIG_FILES:
        if file in files:
            values = {**json.loads(files[file]), key: name}
            files[file] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _append(source: TokenizerSource, names: list[str], kind: SpecialKind) -> TokenizerSource:
    """New special tokens under the next ids."""
    metadata = source.metadata
    size = metadata.vocab_size + len(names)
    try:
        if metadata.kind == "sentencepiece":
            model = append_special_pieces(source.model, names, kind=kind)
        else:
            model = append_special_tokens(source.model, names)
    except ValueError as error:
        raise ValueError(f"{source.origin}: {error}") from None
    special = (*metadata.special_ids, *range(metadata.vocab_size, size))
    return source.with_model(model, vocab_size=size, special_ids=special)
