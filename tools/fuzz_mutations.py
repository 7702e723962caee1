"""Seeded damage to files: what disks, networks, editors and hurried people do to them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORD = re.compile(rb"[A-Za-z_]{2,}")
_NUMBERS = (b"0", b"-1", b"0.5", b"1e400", b"NaN", b"-0.0", b"999999999999999999999", b"null", b"7")
_VALUES = (b"null", b"true", b"[]", b"{}", b'""', b'"x"', b'"../../../etc/passwd"', b'"/dev/zero"')
_ODD_TEXT = (
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    "\u202e".encode(),
    "\U0001f600".encode(),
    b"\t\r",
)


def _place(data: bytes, random_: random.Random) -> int:
    return random_.randrange(len(data)) if data else 0


def _span(data: bytes, random_: random.Random) -> tuple[int, int]:
    first = _place(data, random_)
    return first, min(len(data), first + 1 + int(random_.expovariate(1 / 40)))


def flip_bit(data: bytes, random_: random.Random) -> bytes:
    """One bit, as a bad disk does."""
    changed = bytearray(data)
    changed[_place(data, random_)] ^= 1 << random_.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, random_: random.Random) -> bytes:
    """A few bytes become others."""
    first, last = _span(data, random_)
    return data[:first] + random_.randbytes(last - first) + data[last:]


def zero(data: bytes, random_: random.Random) -> bytes:
    """A stretch becomes zeros, as in a file whose blocks were never written."""
    first, last = _span(data, random_)
    return data[:first] + bytes(last - first) + data[last:]


def truncate(data: bytes, random_: random.Random) -> bytes:
    """The end is missing, as after a full disk or a killed copy."""
    return data[: _place(data, random_)]


def empty(data: bytes, random_: random.Random) -> bytes:
    """Nothing is left."""
    return b""


def append(data: bytes, random_: random.Random) -> bytes:
    """Something follows."""
    return data + random_.randbytes(random_.randint(1, 64))


def delete(data: bytes, random_: random.Random) -> bytes:
    """A stretch is missing."""
    first, last = _span(data, random_)
    return data[:first] + data[last:]


def repeat(data: bytes, random_: random.Random) -> bytes:
    """A stretch is there twice."""
    first, last = _span(data, random_)
    return data[:last] + data[first:last] + data[last:]


def replace_number(data: bytes, random_: random.Random) -> bytes:
    """A number becomes an unlikely one."""
    return _replace(_NUMBER, random_.choice(_NUMBERS), data, random_)


def replace_value(data: bytes, random_: random.Random) -> bytes:
    """A value becomes one of another type."""
    return _replace(re.compile(rb"(?<=[:,\[] )[^\s,\]}]+"), random_.choice(_VALUES), data, random_)


def misspell(data: bytes, random_: random.Random) -> bytes:
    """A word loses a letter."""
    found = list(_WORD.finditer(data))
    if not found:
        return delete(data, random_)
    word = random_.choice(found)
    place = random_.randrange(word.start(), word.end())
    return data[:place] + data[place + 1 :]


def insert_odd_text(data: bytes, random_: random.Random) -> bytes:
    """Bytes that editors show as nothing."""
    place = _place(data, random_)
    return data[:place] + random_.choice(_ODD_TEXT) + data[place:]


def nest(data: bytes, random_: random.Random) -> bytes:
    """A value becomes very deep."""
    place, depth = _place(data, random_), random_.choice((50, 5000))
    return data[:place] + b"[" * depth + b"]" * depth + data[place:]


def delete_line(data: bytes, random_: random.Random) -> bytes:
    """A line is missing."""
    lines = data.splitlines(keepends=True)
    if len(lines) > 1:
        lines.pop(random_.randrange(len(lines)))
    return b"".join(lines)


def repeat_line(data: bytes, random_: random.Random) -> bytes:
    """A line is there twice, perhaps elsewhere."""
    lines = data.splitlines(keepends=True)
    if lines:
        lines.insert(random_.randrange(len(lines)), random_.choice(lines))
    return b"".join(lines)


def indent(data: bytes, random_: random.Random) -> bytes:
    """A line moves to the right."""
    lines = data.splitlines(keepends=True)
    if lines:
        number = random_.randrange(len(lines))
        lines[number] = b"  " + lines[number]
    return b"".join(lines)


def _replace(
    pattern: re.Pattern[bytes], value: bytes, data: bytes, random_: random.Random
) -> bytes:
    found = list(pattern.finditer(data))
    if not found:
        return overwrite(data, random_)
    place = random_.choice(found)
    return data[: place.start()] + value + data[place.end() :]


BINARY: tuple[Mutation, ...] = (
    flip_bit,
    overwrite,
    zero,
    truncate,
    empty,
    append,
    delete,
    repeat,
)
TEXT: tuple[Mutation, ...] = (
    *BINARY,
    replace_number,
    replace_number,
    replace_value,
    replace_value,
    misspell,
    insert_odd_text,
    nest,
    delete_line,
    repeat_line,
    indent,
)


def is_text(data: bytes) -> bool:
    """Whether people can read it."""
    return b"\x00" not in data[:4096] and all(byte < 128 for byte in data[:512])


def damaged(data: bytes, random_: random.Random) -> tuple[str, bytes]:
    """The name of a mutation, and the bytes it made of `data`, which differ from them."""
    kinds = TEXT if is_text(data) else BINARY
    while True:
        mutation = random_.choice(kinds) if data else append
        changed = mutation(data, random_)
        if changed != data:
            return mutation.__name__, changed
