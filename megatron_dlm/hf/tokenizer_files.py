"""The tokenizer of an exported directory: what transformers reads, and our own files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_dlm.data.tokenization.encoder_probes import probe_texts
from megatron_dlm.data.tokenization.sentencepiece_json import tokenizer_json
from megatron_dlm.data.tokenization.sentencepiece_model import SPACE_MARK
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, open_source
from megatron_dlm.data.tokenization.tokenizer_source import (
    TokenizerSource,
    read_source,
    special_names,
)

# The libraries know other versions of Unicode, and choose differently between equal pieces.
_TOLERATED_SHARE = 0.02
# What a tokenizer_config.json may say of the machine it was made on, or of who made it.
_PRIVATE = (
    "auth_token",
    "cache_dir",
    "name_or_path",
    "special_tokens_map_file",
    "token",
    "tokenizer_file",
    "use_auth_token",
    "vocab_file",
)


@dataclass(frozen=True)
class TokenizerParity:
    """How many of the probe texts become other tokens in Hugging Face's library."""

    num_texts: int
    num_different: int
    first_different: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_tokenizer(
    path: Path, directory: Path, *, max_length: int
) -> tuple[Tokenizer, TokenizerParity | None]:
    """Write a tokenizer into `directory`; returns it, and how equal a converted one is.

    Raises ValueError for a tokenizer that a tokenizer.json cannot express.
    """
    source = read_source(path)
    tokenizer = open_source(source)
    for name, content in source.files.items():
        (directory / name).write_bytes(content)
    source.metadata.write(directory)
    parity = None
    if source.metadata.kind == "sentencepiece":
        spec = tokenizer_json(source.model, normalization=source.metadata.normalization)
        parity = compare_tokenizers(spec, tokenizer, special_names(source))
        if parity.num_different > _TOLERATED_SHARE * parity.num_texts:
            raise ValueError(
                f"the tokenizer {path} cannot be expressed as a tokenizer.json: "
                f"{parity.num_different} of {parity.num_texts} texts, {parity.first_different!r} "
                "for one, would become other tokens; leave it out with --tokenizer none"
            )
        (directory / "tokenizer.json").write_text(spec, encoding="utf-8")
    settings = json.dumps(_settings(source, max_length), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    return tokenizer, parity


def compare_tokenizers(spec: str, tokenizer: Tokenizer, special: dict[str, int]) -> TokenizerParity:
    """A tokenizer.json against the tokenizer it was made from, in both directions.

    Left out are texts that name special tokens, which Hugging Face's library finds in text by
    convention, and texts with the sign that SentencePiece writes for a space.
    """
    theirs = tokenizers.Tokenizer.from_str(spec)
    names = (*special, SPACE_MARK)
    texts = [text for text in probe_texts([]) if not any(name in text for name in names)]
    expected = tokenizer.encode_batch(texts)
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    unknown = tokenizer.model.unknown_id
    different = []
    for text, ours, encoding in zip(texts, expected, encoded, strict=True):
        # The two write the sign of an unknown differently.
        same_text = unknown in ours or theirs.decode(ours) == tokenizer.decode(ours)
        if encoding.ids != ours or not same_text:
            different.append(text)
    first = different[0][:40] if different else None
    return TokenizerParity(len(texts), len(different), first)


def _settings(source: TokenizerSource, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: what was there, and that the tokenizer.json says it all."""
    metadata = source.metadata
    old = json.loads(source.files.get("tokenizer_config.json", b"{}"))
    old = {
        name: value
        for name, value in old.items()
        if name not in ("auto_map", "added_tokens_decoder", *_PRIVATE)
    }
    names = {token: name for name, token in special_names(source).items()}
    roles = {
        "pad_token": metadata.pad_id,
        "bos_token": metadata.bos_id,
        "eos_token": metadata.eod_id,
        "mask_token": metadata.mask_id,
    }
    tokens = {role: names[token] for role, token in roles.items() if token is not None}
    return {
        **old,
        **tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # so that what is generated follows the prompt
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
