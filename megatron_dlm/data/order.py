"""A shuffle as a function: the place of any element without a table, in O(1) time and memory.

A Feistel network (Luby and Rackoff 1988) is a bijection on [0, 2^bits) for any round function;
walking its cycle to a value below `size` makes it one on [0, size) (Black and Rogaway 2002).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar, cast

import numpy as np

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 8
# A round changes little of a small block: reaching all orders evenly takes more of them.
_NUM_ROUNDS_SMALL, _SMALL_BITS = 24, 12

Index = TypeVar("Index", int, np.ndarray)


class Use(IntEnum):
    """What a derived key is for."""

    DOCUMENT_ORDER = 1
    WINDOW_ORDER = 2


def derive_key(seed: int, *parts: int) -> int:
    """A 64-bit key that depends on the seed and on every part in its place."""
    key = _scramble(seed & _MASK)
    for part in parts:
        key = _scramble(key ^ (part & _MASK))
    return key


def permute(index: Index, *, size: int, key: int) -> Index:
    """Where `index` goes in the permutation of [0, size) that `key` selects.

    Takes a Python int or an integer array of any shape (then int64 comes back); both give the same.
    """
    assert 0 < size <= 1 << 62, size
    bits = max(2, (size - 1).bit_length())
    num_rounds = _NUM_ROUNDS_SMALL if bits <= _SMALL_BITS else _NUM_ROUNDS
    rounds = [_scramble((key + number) & _MASK) for number in range(num_rounds)]
    if not isinstance(index, np.ndarray):
        assert 0 <= index < size, (index, size)
        place = _feistel(int(index), bits=bits, rounds=rounds)
        while place >= size:  # fewer than two rounds on average: size > 2^bits / 2
            place = _feistel(place, bits=bits, rounds=rounds)
        return cast(Index, place)
    assert index.size == 0 or (index.min() >= 0 and index.max() < size), size
    places = _feistel(index.reshape(-1).astype(np.uint64), bits=bits, rounds=rounds)
    while (outside := np.flatnonzero(places >= size)).size:
        places[outside] = _feistel(places[outside], bits=bits, rounds=rounds)
    return cast(Index, places.astype(np.int64).reshape(index.shape))


def _feistel(value: Any, *, bits: int, rounds: list[int]) -> Any:
    """One pass over [0, 2^bits): the two halves change each other in turn."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    high, low = value >> low_bits, value & low_mask
    for number, round_key in enumerate(rounds):
        if number % 2 == 0:
            high = high ^ (_scramble(low ^ round_key) & high_mask)
        else:
            low = low ^ (_scramble(high ^ round_key) & low_mask)
    return (high << low_bits) | low


def _scramble(value: Any) -> Any:
    """One step of splitmix64 (Steele et al. 2014) on a Python int below 2^64 or a uint64 array."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
