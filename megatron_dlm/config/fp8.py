"""How FP8 training quantizes; read where train.precision is fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.checks import require


@dataclass(frozen=True)
class Fp8Config:
    """Which matrix products run in FP8 and how their scales are found (Transformer Engine)."""

    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scales per tensor from its present values (tensorwise) or its past ones (delayed), per block
    of 128 (blockwise), or per 32 values (mxfp8, Blackwell)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """Gradients in e5m2 and the rest in e4m3 (hybrid), or all in e4m3; blockwise wants e4m3."""
    num_layers_at_start_in_bf16: int = 0
    """The first N layers stay in bf16."""
    num_layers_at_end_in_bf16: int = 0
    """The last N layers stay in bf16."""
    amax_history_len: int = 1024
    """delayed: steps whose largest values decide a scale."""
    param_gather: bool = False
    """Keep and gather the parameters of data-parallel ranks in FP8."""

    def __post_init__(self) -> None:
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(self, name)
            require(value >= 0, f"fp8.{name} is {value}; it must be at least 0")
        require(
            self.amax_history_len > 0,
            f"fp8.amax_history_len is {self.amax_history_len}; it must be greater than 0",
        )
