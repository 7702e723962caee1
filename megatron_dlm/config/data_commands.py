"""Configuration of the `megatron-dlm data` commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dlm.config.checks import require, require_fraction, require_positive

_NO_INPUT = "input is empty; name a dataset by the path of its shard or list without the ending"


def _require_workers(workers: int) -> None:
    require(workers >= 0, f"workers is {workers}; it must be at least 0 (0 = one per core)")


@dataclass(frozen=True)
class InspectConfig:
    """Show what shards hold: documents, tokens, lengths, ids, and text decoded from them."""

    input: list[str]
    """Datasets: paths of shards or lists of shards without .bin/.idx/.dataset.json; globs too."""
    tokenizer: str | None = None
    """Tokenizer that made the ids: decodes the windows and names the special ids."""
    num_windows: int = 3
    """Stretches of text to show from places drawn at random."""
    window_tokens: int = 64
    """Tokens in one stretch; it ends with its document."""
    seed: int = 1234
    """Seed of the draw of places."""
    max_tokens: int | None = None
    """Count ids in about this many tokens, from the beginning of every shard; null: in all."""
    workers: int = 0
    """Processes that read, a shard at a time; 0: one per core."""
    output: str | None = None
    """Also write every number to this JSON file."""

    def __post_init__(self) -> None:
        require(bool(self.input), _NO_INPUT)
        require(self.num_windows >= 0, f"num_windows is {self.num_windows}; it must be 0 or more")
        require_positive("inspect", {"window_tokens": self.window_tokens})
        if self.max_tokens is not None:
            require_positive("inspect", {"max_tokens": self.max_tokens})
        _require_workers(self.workers)


@dataclass(frozen=True)
class CountConfig:
    """Count documents, tokens and bytes of datasets without reading their tokens."""

    input: list[str]
    """Datasets: paths of shards or lists of shards without .bin/.idx/.dataset.json; globs too."""
    seq_length: int | None = None
    """Also count the windows of this many tokens that make one epoch (with data.packing concat)."""
    unique_tokens: int | None = None
    """Count windows and epochs for a budget of this many tokens of the one dataset."""
    train_tokens: int | None = None
    """Also say how many epochs a training run of this many tokens is."""
    output: str | None = None
    """Also write every number to this JSON file."""

    def __post_init__(self) -> None:
        require(bool(self.input), _NO_INPUT)
        for name in ("seq_length", "unique_tokens", "train_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be greater than 0")


@dataclass(frozen=True)
class VerifyConfig:
    """Read shards through and name the first bad document of every damaged one."""

    input: list[str]
    """Datasets: paths of shards or lists of shards without .bin/.idx/.dataset.json; globs too."""
    against: list[str] = field(default_factory=list)
    """Datasets that must share no document with `input`, such as those for validation."""
    tokenizer: str | None = None
    """Tokenizer whose vocabulary holds for shards without a manifest, such as Megatron-LM's own."""
    index_only: bool = False
    """Check sizes, indices and lists, and leave the tokens unread."""
    workers: int = 0
    """Processes that read, a shard at a time; 0: one per core."""
    output: str | None = None
    """Also write the verdict of every shard to this JSON file."""

    def __post_init__(self) -> None:
        require(bool(self.input), _NO_INPUT)
        require(
            not (self.index_only and self.against),
            "index_only is true, but against needs every token; leave one of them out",
        )
        _require_workers(self.workers)


@dataclass(frozen=True)
class SplitConfig:
    """Hold documents out for validation, chosen by the hash of their tokens: the same documents
    however the text is sharded, ordered or extended."""

    input: list[str]
    """Datasets: paths of shards or lists of shards without .bin/.idx/.dataset.json; globs too."""
    output_prefix: str
    """Path of the new dataset without .dataset.json; the held-out one is PREFIX_valid."""
    fraction: float = 0.01
    """Share of the documents that is held out."""
    tokenizer: str | None = None
    """Tokenizer that made the ids, for shards without a manifest, such as Megatron-LM's own."""
    shard_size_bytes: int = 1 << 30
    """Begin a new shard when the .bin holds this much."""
    workers: int = 0
    """Processes; 0: one per core."""
    overwrite: bool = False
    """Remove what an earlier command wrote under output_prefix first."""

    def __post_init__(self) -> None:
        require(bool(self.input), _NO_INPUT)
        require(bool(self.output_prefix), "output_prefix is empty; give the path of a dataset")
        require_fraction("split", {"fraction": self.fraction}, below_one=True)
        sizes = {"fraction": self.fraction, "shard_size_bytes": self.shard_size_bytes}
        require_positive("split", sizes)
        _require_workers(self.workers)


@dataclass(frozen=True)
class MergeConfig:
    """Make one dataset of many shards: the array tasks of a preprocess run, or any others."""

    output_prefix: str
    """Path of the dataset without .dataset.json; alone: the output_prefix of the preprocess run."""
    input: list[str] = field(default_factory=list)
    """Shards and datasets to join, in this order; globs too; empty: those of the preprocess run."""
    copy: bool = False
    """Copy all tokens to one PREFIX.bin/.idx instead of listing the shards where they are."""
    array_count: int | None = None
    """Tasks of the job array, to name those that must run again."""

    def __post_init__(self) -> None:
        require(bool(self.output_prefix), "output_prefix is empty; give the path of a dataset")
        require(
            bool(self.input) or not self.copy,
            "copy is true, but input is empty; name the dataset to copy",
        )
        count = self.array_count
        require(count is None or count > 0, f"array_count is {count}; it must be greater than 0")
