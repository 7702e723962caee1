"""Configuration of every command but `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive
from megatron_dlm.config.schema import RunConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a SentencePiece tokenizer with reserved mask, pad, begin and end-of-document tokens."""

    input: list[str]
    """Files to learn from: .jsonl (one object with text_field per line) or plain text."""
    output_dir: str
    """Directory for tokenizer.model and metadata.json."""
    vocab_size: int = 8192
    """Tokens in the vocabulary, the reserved ones included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece algorithm."""
    text_field: str = "text"
    """Key of the text in a .jsonl object."""
    byte_fallback: bool = True
    """Spell characters outside the vocabulary in bytes, so that any text round-trips."""
    split_digits: bool = True
    """Give every digit its own token."""
    max_sentences: int = 1_000_000
    """Learn from at most this many lines, drawn at random."""
    seed: int = 1234
    """Seed of that draw."""

    def __post_init__(self) -> None:
        require(bool(self.input), "input is empty; name at least one file")
        require_positive("tokenizer", {"max_sentences": self.max_sentences})
        minimum = 256 + 16 if self.byte_fallback else 16
        require(
            self.vocab_size >= minimum,
            f"vocab_size is {self.vocab_size}; it must be at least {minimum}"
            + (" (256 tokens are bytes)" if self.byte_fallback else ""),
        )


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn text into Megatron's .bin/.idx shards with a manifest."""

    input: list[str]
    """Files to read: .jsonl (one document per line) or plain text (one document per file)."""
    output_prefix: str
    """Path of the shards without .bin/.idx; with a validation share: PREFIX and PREFIX_valid."""
    tokenizer: str
    """Directory made by `megatron-dlm tokenizer`."""
    text_field: str = "text"
    """Key of the text in a .jsonl object."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    validation_fraction: float = 0.0
    """Share of the documents that goes to a validation shard instead."""
    minimum_characters: int = 1
    """Skip documents shorter than this."""

    def __post_init__(self) -> None:
        require(bool(self.input), "input is empty; name at least one file")
        fractions = {"validation_fraction": self.validation_fraction}
        require_fraction("preprocess", fractions, below_one=True)
        require(
            self.minimum_characters >= 1,
            f"minimum_characters is {self.minimum_characters}; it must be at least 1",
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
    """Directory for corpus, tokenizer, shards, both runs and the picture."""
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
