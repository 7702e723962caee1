"""The bytes of a plain, gzip or zstd file as one stream that knows where damage begins."""

from __future__ import annotations

import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import zstandard

_BUFFER_BYTES = 1 << 18


class Codec(NamedTuple):
    """A streaming decompressor."""

    name: str
    new_decoder: Callable[[], Any]
    """Decoder of one gzip member or zstd frame: `decompress`, `eof`, `unused_data`."""
    error: type[Exception]
    step_bytes: int
    """Packed bytes decoded at once: few, for text that repeats itself grows 10,000 times."""
    padding: bytes
    """What may fill the room between members."""


_GZIP = Codec("gzip", lambda: zlib.decompressobj(wbits=31), zlib.error, 1 << 14, b"\0")
_ZSTD = Codec(
    "zstd",
    # The largest window that `zstd --long=31` writes.
    lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    zstandard.ZstdError,
    1 << 11,
    b"",
)
CODECS = {".gz": _GZIP, ".zst": _ZSTD, ".zstd": _ZSTD}


class Damage(NamedTuple):
    """Why a stream ended before its file did."""

    reason: Literal["truncated_file", "damaged_file"]
    what: str


class ByteStream(io.BufferedReader):
    """Binary stream; after its end, `damage` tells whether that was the end of the data."""

    @property
    def damage(self) -> Damage | None:
        """Why the stream ended too early; None while it flows and where it ended well."""
        return self.raw.damage if isinstance(self.raw, _Decompressed) else None

    def skip_to(self, offset: int) -> None:
        """Go on at `offset` bytes from the beginning; the stream must still stand there.

        Raises ValueError where the stream is shorter.
        """
        if not isinstance(self.raw, _Decompressed):
            self.seek(offset)
            return
        left = offset
        while left > 0:
            passed = len(self.read1(min(left, _BUFFER_BYTES)))
            if passed == 0:
                raise ValueError(
                    f"{self.raw.path}: unpacks to {offset - left:,} bytes, {offset:,} were read "
                    "before; start anew and leave the input alone meanwhile"
                )
            left -= passed


def open_bytes(path: str, codec: str | None) -> ByteStream:
    """Open a file for reading from its beginning; `codec` is a key of `CODECS`, None for plain."""
    raw = io.FileIO(path) if codec is None else _Decompressed(path, CODECS[codec])
    return ByteStream(raw, _BUFFER_BYTES)


def num_lines_before(path: str, codec: str | None, offset: int) -> int:
    """Line ends in the first `offset` bytes of the unpacked text; reads them, but only once."""
    if offset == 0:
        return 0
    state = os.stat(path)
    return _count_lines(path, codec, offset, (state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=64)
def _count_lines(path: str, codec: str | None, offset: int, _version: tuple[int, int]) -> int:
    count = 0
    with open_bytes(path, codec) as stream:
        while offset > 0 and (block := stream.read1(min(offset, _BUFFER_BYTES))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


class _Decompressed(io.RawIOBase):
    """Unpacked bytes of a file; ends at the first damage, after every byte before it."""

    def __init__(self, path: str, codec: Codec) -> None:
        self.path = path
        self.damage: Damage | None = None
        self._codec = codec
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the stream
        self._decoder: Any = None
        self._blocks = self._decompress()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def readall(self) -> bytes:
        first, self._rest = bytes(self._rest), memoryview(b"")
        return b"".join([first, *self._blocks])

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, careful_from: int = sys.maxsize, delivered: int = 0) -> Iterator[bytes]:
        """Blocks of unpacked bytes, less the first `delivered`.

        A step that meets damage is decoded once more, from the beginning of the file and then byte
        by byte from `careful_from`, so that nothing before the damage is lost.
        """
        self._decoder, position = None, 0
        for begin, packed in self._steps(careful_from):
            try:
                for block in self._decode(packed):
                    new = block[max(delivered - position, 0) :]
                    position += len(block)
                    yield new
            except self._codec.error as error:
                if begin < careful_from:
                    yield from self._decompress(begin, position)
                else:
                    what = f"the {self._codec.name} data is damaged ({error}); fetch the file again"
                    self.damage = Damage("damaged_file", what)
                return
        if self._decoder is not None:
            what = f"the {self._codec.name} data ends in the middle; fetch the file again"
            self.damage = Damage("truncated_file", what)

    def _steps(self, careful_from: int) -> Iterator[tuple[int, bytes]]:
        """The packed file in small steps, in single bytes from `careful_from`; with their place."""
        self._file.seek(0)
        begin = 0
        while True:
            size = min(self._codec.step_bytes, careful_from - begin) if begin < careful_from else 1
            packed = self._file.read(size)
            if not packed:
                return
            yield begin, packed
            begin += len(packed)

    def _decode(self, packed: bytes) -> Iterator[bytes]:
        """Unpack the next step; members of a file may end and begin in its middle."""
        while packed:
            if self._decoder is None:
                packed = packed.lstrip(self._codec.padding)
                if not packed:
                    return
                self._decoder = self._codec.new_decoder()
            block = self._decoder.decompress(packed)
            packed = b""
            if self._decoder.eof:
                packed, self._decoder = self._decoder.unused_data, None
            if block:
                yield block
