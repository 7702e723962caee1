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
    """The first N layers stay in bf16 (not with delayed)."""
    num_layers_at_end_in_bf16: int = 0
    """The last N layers stay in bf16 (not with delayed)."""
    amax_history_len: int = 1024
    """delayed: steps whose largest values decide a scale."""

    def __post_init__(self) -> None:
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(self, name)
            require(value >= 0, f"fp8.{name} is {value}; it must be at least 0")
        require(
            self.amax_history_len > 0,
            f"fp8.amax_history_len is {self.amax_history_len}; it must be greater than 0",
        )
        self._check_recipe()

    def _check_recipe(self) -> None:
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        require(
            self.recipe != "delayed" or start == end == 0,
            f"fp8.recipe delayed reduces its scales over all layers at once: it cannot keep "
            f"{start} first and {end} last layers in bf16 (fp8.num_layers_at_start_in_bf16, "
            "fp8.num_layers_at_end_in_bf16); use recipe tensorwise",
        )
        require(
            self.recipe != "blockwise" or self.format == "e4m3",
            f"fp8.recipe blockwise has scales fine enough for e4m3 gradients; fp8.format is "
            f"{self.format}, use e4m3",
        )

    @property
    def keeps_bf16_layers(self) -> bool:
        """Some layers at either end stay in bf16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16 > 0

    @property
    def alignment(self) -> int:
        """Numbers in a row, and rows, of every quantized matrix come in multiples of this."""
        return 32 if self.recipe == "mxfp8" else 16
