"""Rotary positions. Shapes: b rows, s slots, d width of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(width: int, base: float, scaling_factor: float | None) -> Tensor:
    """float32 [d / 2] radians per position, for heads of `width` = d.

    With a scaling factor they are stretched as in Llama 3.1: where a wave is longer than 2048
    positions, fully from 8192 on.
    """
    frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling_factor is None:
        return frequencies
    num_waves = 8192 * frequencies / (2 * math.pi)
    kept = ((num_waves - 1) / (4 - 1)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling_factor + kept * frequencies


def rotary_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, s, d] of positions [b, s]; angles in float32."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [b, heads, s, d] against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
