"""Configuration of every command but `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive
from megatron_dlm.config.schema import RunConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a SentencePiece tokenizer with reserved special tokens, or adopt an existing one."""

    input: list[str] = field(default_factory=list)
    """Files, directories, globs or @LIST files to learn from: .jsonl (also .gz, .zst), .parquet or
    plain text. With `existing` only bytes per token are measured on them, and they may be left
    out."""
    output_dir: str = field(kw_only=True)
    """Directory for the tokenizer's files, metadata.json and token_bytes.npy (bytes of text that
    each id stands for)."""
    vocab_size: int = 8192
    """Tokens to train, the reserved ones included."""
    vocab_size_divisible_by: int = 1
    """Unused ids are added after all others until the vocabulary is a multiple of this."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece algorithm."""
    text_field: str = "text"
    """Key of the text in a JSON object, or column of a parquet file."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at text that cannot be read: stop, or count it and go on."""
    byte_fallback: bool = True
    """Spell characters outside the vocabulary in bytes, so that any text round-trips."""
    split_digits: bool = True
    """Give every digit its own token."""
    max_sentences: int = 1_000_000
    """Learn from at most this many lines, drawn at random."""
    seed: int = 1234
    """Seed of that draw."""
    existing: str | None = None
    """Tokenizer to adopt instead of training one: SentencePiece .model, Hugging Face tokenizer.json
    or directory, or a directory made by this command."""
    add_mask_token: bool = False
    """Give the existing tokenizer a mask token after all its ids; text keeps the ids it had."""
    mask_token: str = "<mask>"
    """Name of the mask token to train or add; the same letters in a text are never this token."""
    eod_token: str | None = None
    """Special token of the existing tokenizer that ends documents; default: what it says itself."""

    def __post_init__(self) -> None:
        positive = {
            "max_sentences": self.max_sentences,
            "vocab_size_divisible_by": self.vocab_size_divisible_by,
        }
        require_positive("tokenizer", positive)
        require(
            bool(self.mask_token) and not any(letter.isspace() for letter in self.mask_token),
            f"mask_token is {self.mask_token!r}; it must be letters without blanks",
        )
        if self.existing is None:
            self._check_training()
        else:
            self._check_adoption()

    def _check_training(self) -> None:
        require(
            bool(self.input),
            "input is empty; name at least one file to learn from, or the tokenizer to adopt in "
            "existing",
        )
        for name in ("add_mask_token", "eod_token"):
            require(
                not getattr(self, name),
                f"{name} is {getattr(self, name)} without existing; a trained tokenizer has both "
                "tokens",
            )
        reserved = ("<pad>", "<bos>", "<eod>", "<unk>")
        require(
            self.mask_token not in reserved,
            f"mask_token is {self.mask_token}; {', '.join(reserved)} have other meanings",
        )
        minimum = 256 + 16 if self.byte_fallback else 16
        require(
            self.vocab_size >= minimum,
            f"vocab_size is {self.vocab_size}; it must be at least {minimum}"
            + (" (256 tokens are bytes)" if self.byte_fallback else ""),
        )

    def _check_adoption(self) -> None:
        training = (
            *("vocab_size", "model_type", "byte_fallback", "split_digits"),
            *("max_sentences", "seed"),
        )
        for name in training:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(
                value == default,
                f"{name} is {value}, but an existing tokenizer is not trained; leave out {name} or "
                "existing",
            )


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn text into Megatron's .bin/.idx shards; run again, an interrupted command goes on."""

    input: list[str]
    """Files, directories, globs or @LIST files: .jsonl (also .gz, .zst), .parquet or plain text."""
    output_prefix: str
    """The shards are PREFIX_JOB_PART.bin/.idx and PREFIX.dataset.json lists them; held-out
    documents go to PREFIX_valid."""
    tokenizer: str
    """Directory made by `megatron-dlm tokenizer`, SentencePiece .model, or Hugging Face
    tokenizer.json or directory."""
    text_field: str = "text"
    """Key of the text in a JSON object, or column of a parquet file."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    validation_fraction: float = 0.0
    """Share of the documents, chosen by their hash, that goes to PREFIX_valid instead."""
    minimum_characters: int = 1
    """Leave out documents shorter than this."""
    shard_size_bytes: int = 512 * 1024**2
    """Text that is read for one shard; larger plain .jsonl and .parquet files are cut here into
    jobs that run in parallel."""
    workers: int = 0
    """Processes that work side by side; 0: one per core."""
    encoder: Literal["auto", "fast", "reference"] = "auto"
    """auto: the fast library where it is proved to give the tokenizer's own ids."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at text that cannot be read: stop, or count it and go on."""
    array_index: int | None = None
    """Number of this task among array_count tasks that share the work, from 0; default: from
    Slurm's job array, else 0."""
    array_count: int | None = None
    """Tasks that share the work; default: from Slurm's job array, else 1."""
    overwrite: bool = False
    """Remove what an earlier run left under output_prefix and start anew."""

    def __post_init__(self) -> None:
        require(bool(self.input), "input is empty; name at least one file")
        require(
            bool(self.output_prefix) and not self.output_prefix.endswith("/"),
            f"output_prefix is {self.output_prefix!r}; it must end with the name of the dataset",
        )
        fractions = {"validation_fraction": self.validation_fraction}
        require_fraction("preprocess", fractions, below_one=True)
        require_positive("preprocess", {"shard_size_bytes": self.shard_size_bytes})
        require(
            self.minimum_characters >= 1,
            f"minimum_characters is {self.minimum_characters}; it must be at least 1",
        )
        require(self.workers >= 0, f"workers is {self.workers}; it must be at least 0")
        self._check_array()

    def _check_array(self) -> None:
        index, count = self.array_index, self.array_count
        if index is None or count is None:
            require(
                index is None and count is None,
                f"array_index is {index} and array_count is {count}; give both or none",
            )
            return
        require(
            0 <= index < count,
            f"array_index is {index} and array_count is {count}; the index must be 0 to count - 1",
        )
        require(
            not (self.overwrite and count > 1),
            "overwrite would let array tasks remove each other's shards; remove them beforehand",
        )


@dataclass(frozen=True)
class PlanConfig:
    """The machine that `plan` reckons with."""

    num_gpus: int = 1
    """Ranks of the run; the parallel sizes must divide it."""
    device: Literal[
        "H100 PCIe", "H100 NVL", "H100", "H200", "H800", "B200", "A100", "A800", "L40S"
    ] = "H100"
    """GPU, for its peak FLOP/s (dense bf16) and memory."""
    peak_flops: float | None = None
    """Peak FLOP/s of one rank; default: that of the device."""
    mfu: float = 0.4
    """Share of the peak that the run is expected to reach (model FLOPs utilisation)."""
    output: str | None = None
    """Also write every number to this JSON file."""

    def __post_init__(self) -> None:
        require_positive("plan", {"num_gpus": self.num_gpus, "mfu": self.mfu})
        require(self.mfu <= 1, f"plan.mfu is {self.mfu}; it must be at most 1")
        require(
            self.peak_flops is None or self.peak_flops > 0,
            f"plan.peak_flops is {self.peak_flops}; it must be greater than 0",
        )


@dataclass(frozen=True)
class PlanRunConfig(RunConfig):
    """Parameters, FLOPs, memory and time of a run, before a GPU is spent on it."""

    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass(frozen=True)
class QuickstartConfig:
    """Train an autoregressive and a masked-diffusion model side by side on a laptop."""

    output_dir: str = "quickstart"
    """Directory for corpus, tokenizer, shards, both runs, their exports, scores and the picture."""
    num_ranks: int = 2
    """Processes of the run."""
    seed: int = 1234
    """Seed of both runs."""
    steps: int = 1000
    """Updates of each model, 4096 tokens each."""
    unique_tokens: int = 49_152
    """Different tokens in the training data; the more, the later the curves cross."""

    def __post_init__(self) -> None:
        sizes = {
            "num_ranks": self.num_ranks,
            "steps": self.steps,
            "unique_tokens": self.unique_tokens,
        }
        require_positive("quickstart", sizes)
