"""Configuration of `export` and `import`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.checks import require, require_positive


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint of any layout as a Hugging Face directory, and prove that it is equal."""

    checkpoint: str
    """Run directory (its newest whole checkpoint is taken) or one checkpoint, iter_NNNNNNN."""
    output_dir: str
    """Directory to make; it appears under this name when everything in it is written and equal."""
    step: int | None = None
    """Take the checkpoint of this step of the run."""
    layout: Literal["auto", "megatron_dlm", "megadlms"] = "auto"
    """auto: stock Qwen3, Qwen3-MoE, Qwen2 or Llama where it computes the same, else our own code;
    megatron_dlm: always our code; megadlms: for MegaDLMs' own code, which is not included."""
    dtype: Literal["checkpoint", "fp32", "bf16"] = "checkpoint"
    """Type of the written weights; checkpoint keeps the type they were trained in."""
    max_shard_bytes: int = 5_000_000_000
    """Largest weight file; a larger tensor still gets one of its own."""
    tokenizer: str | None = None
    """Tokenizer directory; default: the one the run was trained with; none leaves it out."""
    model_name: str | None = None
    """Title of the model card; default: the name of output_dir."""
    license: str | None = None
    """Licence that the model card states; default: none."""
    overwrite: bool = False
    """Replace an older export in output_dir."""
    parity: bool = True
    """Compare logits of the written model with those of the checkpoint, layer by layer."""
    parity_text: str | None = None
    """UTF-8 file whose text is compared on; default: a page of prose and code of our own."""
    parity_tokens: int = 256
    """Tokens to compare on, in two windows no longer than the model's samples."""
    parity_tolerance: float = 1e-4
    """Largest difference of a logit (computed in fp32) that still counts as equal."""
    eager_attention: bool = False
    """megadlms: ask for eager attention in config.json; its code is causal without on old
    transformers (4.48 to 4.52), but then no other implementation can be chosen."""

    def __post_init__(self) -> None:
        require_positive(
            "export",
            {
                "max_shard_bytes": self.max_shard_bytes,
                "parity_tokens": self.parity_tokens,
                "parity_tolerance": self.parity_tolerance,
            },
        )
        require(
            not self.eager_attention or self.layout == "megadlms",
            f"export.eager_attention has no meaning for export.layout {self.layout}; remove it",
        )


@dataclass(frozen=True)
class ImportConfig:
    """Make a Hugging Face model the first checkpoint of a run; `train` goes on from it."""

    model: str
    """Hugging Face directory: Qwen3, Qwen3-MoE, Qwen2, Llama, or one that `export` wrote."""
    output_dir: str
    """Run directory to make: checkpoints/iter_0000000, tokenizer/ and imported.yaml."""
    objective: Literal["same", "autoregressive", "masked", "hybrid", "block"] = "same"
    """What the run will learn; all but autoregressive give an autoregressive model a mask token."""
    mask_token_id: int | None = None
    """Row that becomes the mask; default: the mask the model or its tokenizer has, else the first
    row behind the tokenizer's, which is added where there is none."""
    mask_row: Literal["mean", "keep"] = "mean"
    """Initial value of a row that was no mask before: the mean of all rows of text, or its own."""
    mask_token: str = "<mask>"
    """Name of the mask token that the tokenizer gets."""
    tokenizer: str | None = None
    """Tokenizer; default: the one in the model's directory; none leaves it out."""
    seq_length: int | None = None
    """model.seq_length of the run; default: the model's max_position_embeddings."""
    make_vocab_size_divisible_by: int = 128
    """Rows are padded to a multiple of this, so that tensor parallelism can split them."""
    dtype: Literal["same", "fp32", "bf16"] = "same"
    """Type of the weights in the checkpoint; same keeps the files'."""

    def __post_init__(self) -> None:
        require_positive(
            "import", {"make_vocab_size_divisible_by": self.make_vocab_size_divisible_by}
        )
        require(
            self.seq_length is None or self.seq_length > 0,
            f"import.seq_length is {self.seq_length}; it must be greater than 0",
        )
        require(
            self.mask_token_id is None or self.mask_token_id >= 0,
            f"import.mask_token_id is {self.mask_token_id}; it must be at least 0",
        )
