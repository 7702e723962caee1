"""Data-sheet numbers of GPUs, for `plan` and for the MFU of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers of one GPU."""

    peak_flops: float
    """Dense bf16 peak, FLOP/s."""
    memory_bytes: float


# By a part of the device name; the first match wins, so special forms come first.
GPUS = {
    "H100 PCIe": Gpu(756e12, 80e9),
    "H100 NVL": Gpu(835e12, 94e9),
    "H100": Gpu(989e12, 80e9),
    "H200": Gpu(989e12, 141e9),
    "H800": Gpu(989e12, 80e9),
    "B200": Gpu(2250e12, 180e9),
    "A100": Gpu(312e12, 80e9),
    "A800": Gpu(312e12, 80e9),
    "L40S": Gpu(362e12, 48e9),
}
