"""Small Hugging Face tokenizers of the kinds that published models have, trained on the spot."""

from __future__ import annotations

import json
import math
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.json, and what tokenizer_config.json names.
_Built = tuple[str, dict[str, Any]]


def write_tokenizer(kind: str, directory: Path, **changes: Any) -> Path:
    """The directory of a tokenizer, trained once; `changes` replace parts of tokenizer.json."""
    tokenizer_json, names = _built(kind)
    spec = {**json.loads(tokenizer_json), **changes}
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def gpt2_like(directory: Path) -> Path:
    """Byte-level BPE."""
    return write_tokenizer("gpt2", directory)


def llama3_like(directory: Path) -> Path:
    """Byte-level BPE by tiktoken's scheme."""
    return write_tokenizer("llama3", directory)


def library_texts(pattern: str = "[a-f]*.py", num_texts: int = 30) -> list[str]:
    """Sources of the standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    return [file.read_text(encoding="utf-8") for file in files[:num_texts]]


@cache
def _built(kind: str) -> _Built:
    return KINDS[kind]()


def _gpt2_like() -> _Built:
    """Byte-level BPE; one special token among the first ids, one after, and a text token between.

    The special tokens' ids are apart, so that taking one away must not move the others.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer, ["<|endoftext|>"])
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer.to_str(), dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")


def _llama3_like() -> _Built:
    """tiktoken's scheme: a splitting rule, byte-level BPE, whole words first; end token unnamed."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA_3_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer, [])
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[
            ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>")),
        ],
    )
    return tokenizer.to_str(), {"bos_token": {"content": "<|begin_of_text|>"}}


def _llama2_like() -> _Built:
    """SentencePiece's scheme in JSON: spaces as letters, bytes for the rest, merges of all pieces.

    Its merges can spell "</s>", as those of files converted from SentencePiece can.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    lines = [line for text in library_texts() for line in text.split("\n")]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, *byte_tokens],
        initial_alphabet=["<", "/", "s", ">"],
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(special)]
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    vocab.setdefault("s>", len(vocab))
    vocab.setdefault("</", len(vocab))
    spec["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], ["<", "s>"], *merges]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    return json.dumps(spec), names


def _bert_like() -> _Built:
    """WordPiece: it drops blanks, and has a mask token of its own."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(library_texts(), trainer)
    return tokenizer.to_str(), {"pad_token": "[PAD]", "mask_token": "[MASK]", "sep_token": "[SEP]"}


def _unigram() -> _Built:
    """Unigram as T5 has it: special tokens are pieces with the best of all scores."""
    words = Counter(" ".join(library_texts()).replace(" ", " \u2581").split())
    letters = Counter("".join(words))
    common = {word for word, _ in words.most_common(500)} | set(letters)
    total = sum(words.values()) + sum(letters.values())
    scores = {piece: math.log((words[piece] + letters[piece]) / total) for piece in sorted(common)}
    special = dict.fromkeys(("<pad>", "</s>", "<unk>"), 0.0)
    tokenizer = Tokenizer(models.Unigram([*special.items(), *scores.items()], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str(), {"eos_token": "</s>", "pad_token": "<pad>"}


KINDS: dict[str, Callable[[], _Built]] = {
    "gpt2": _gpt2_like,
    "llama3": _llama3_like,
    "llama2": _llama2_like,
    "bert": _bert_like,
    "unigram": _unigram,
}


def _train_byte_level(tokenizer: Tokenizer, special_tokens: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_texts(), trainer)
