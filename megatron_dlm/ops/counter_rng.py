"""Random numbers as a pure function of counters: no generator, no state, no order of calls.

A draw is a splitmix64-style hash of (seed, stream, purpose, index, position), so any slice of a
batch, computed on any rank at any time, holds the same bits as the whole.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_NORMAL_CHUNK_ELEMENTS = 1 << 18


class Stream(IntEnum):
    """Which part of the program draws. Never change a value: it is part of every run's noise."""

    TRAINING = 0
    VALIDATION = 1
    LIKELIHOOD = 2
    INITIALIZATION = 3


class Purpose(IntEnum):
    """What one draw is for. Never change or reuse a value: it is part of every run's noise."""

    NOISE_LEVEL = 0
    MASK = 1
    LENGTH = 2
    INPUT_MASK = 3
    VALUE = 4
    SAMPLE_KIND = 5
    TOKEN_NOISE_LEVEL = 6
    NOISE_KIND = 7
    NOISE_TOKEN = 8
    INFILLING = 9
    EMPTY_TOKEN = 10
    ATTENTION = 11


def random_bits(seed: int, stream: int, purpose: int, index: Tensor, position: Tensor) -> Tensor:
    """64 random bits as int64, of the broadcast shape of `index` and `position` (int64)."""
    state = _to_signed(_host_chain(seed, stream, purpose))
    rows = _mix((index + 1).mul_(_to_signed(_GOLDEN)).add_(state))
    # The position is multiplied too: plain addition leaves neighbouring positions correlated.
    columns = (position + 1).mul_(_to_signed(_GOLDEN))
    return _mix(rows + columns)


def uniform(seed: int, stream: int, purpose: int, index: Tensor, position: Tensor) -> Tensor:
    """Uniform in [0, 1), fp32: the multiples of 2^-24, so every device gives the same value."""
    return to_uniform(random_bits(seed, stream, purpose, index, position))


def to_uniform(bits: Tensor) -> Tensor:
    """The uniform fp32 number in [0, 1) that `uniform` makes of random bits: the upper 24 bits."""
    return _shift_right(bits, 40).to(torch.float32).mul_(2.0**-24)


def normal(seed: int, stream: int, purpose: int, index: Tensor, position: Tensor) -> Tensor:
    """Standard normal, fp32, of the broadcast shape: Box-Muller in float64 on two chained draws.

    Works in chunks of rows, so a parameter tensor (index [rows, 1], position [1, columns]) needs
    little more memory than its result. Devices may differ in the last bit (log and cos).
    """
    shape: torch.Size = torch.broadcast_shapes(index.shape, position.shape)  # type: ignore[no-untyped-call]
    index, position = (
        counter.reshape((1,) * (len(shape) - counter.dim()) + tuple(counter.shape))
        for counter in (index, position)
    )
    if len(shape) == 0 or math.prod(shape) <= _NORMAL_CHUNK_ELEMENTS:
        return _box_muller(random_bits(seed, stream, purpose, index, position))
    values = torch.empty(shape, dtype=torch.float32, device=index.device)
    num_rows = max(1, _NORMAL_CHUNK_ELEMENTS * shape[0] // math.prod(shape))
    for start in range(0, shape[0], num_rows):
        rows = slice(start, start + num_rows)
        bits = random_bits(seed, stream, purpose, _rows(index, rows), _rows(position, rows))
        values[rows] = _box_muller(bits)
    return values


def host_uniform(seed: int, stream: int, purpose: int, index: int, position: int = 0) -> float:
    """The value of `uniform` computed with Python integers, for decisions taken on the host."""
    state = _host_chain(seed, stream, purpose)
    for word in (index, position):
        state = _host_mix(state + (word + 1) * _GOLDEN)
    return (state >> 40) * 2.0**-24


def _box_muller(bits: Tensor) -> Tensor:
    second = _mix(bits + _to_signed(_GOLDEN))
    radius_uniform = (
        _shift_right(bits, 11).double().add_(1.0).mul_(2.0**-53)
    )  # (0, 1]: log is finite
    angle = _shift_right(second, 11).double().mul_(2.0**-53 * 2.0 * math.pi)
    return radius_uniform.log_().mul_(-2.0).sqrt_().mul_(angle.cos_()).to(torch.float32)


def _rows(counter: Tensor, rows: slice) -> Tensor:
    return counter if counter.shape[0] == 1 else counter[rows]


def _mix(state: Tensor) -> Tensor:
    """The splitmix64 finalizer, in place; int64 products wrap around as uint64 ones do."""
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_to_signed(_MULTIPLIER_1))
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_to_signed(_MULTIPLIER_2))
    return state.bitwise_xor_(_shift_right(state, 31))


def _shift_right(state: Tensor, num_bits: int) -> Tensor:
    """Shift that fills with zeros; int64 `>>` alone would copy the sign bit."""
    return (state >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def _host_chain(seed: int, stream: int, purpose: int) -> int:
    state = 0
    for word in (seed, stream, purpose):
        state = _host_mix(state + (word + 1) * _GOLDEN)
    return state


def _host_mix(state: int) -> int:
    state &= _WORD
    state = ((state ^ (state >> 30)) * _MULTIPLIER_1) & _WORD
    state = ((state ^ (state >> 27)) * _MULTIPLIER_2) & _WORD
    return state ^ (state >> 31)


def _to_signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word
