"""GPUs that `plan` can reckon with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers of one GPU."""

    peak_flops: float
    """Dense bf16 peak, FLOP/s."""
    memory_bytes: float


GPUS = {
    "A100": Gpu(312e12, 80e9),
    "H100": Gpu(989e12, 80e9),
    "H200": Gpu(989e12, 141e9),
    "B200": Gpu(2250e12, 180e9),
    "L40S": Gpu(362e12, 48e9),
}
