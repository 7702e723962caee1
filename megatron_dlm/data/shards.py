"""Megatron's `.bin/.idx` shards, read through mmap and written whole or not at all; numpy only.

`.bin` holds the token ids back to back. `.idx` holds, little-endian: 9 bytes magic, uint64 version,
uint8 dtype code, uint64 number of sequences n, uint64 number of document bounds m, int32 [n]
lengths, int64 [n] byte offsets, int64 [m] first sequence of each document and the end.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_dlm.data.manifest import Manifest, manifest_path

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
# Below this vocabulary Megatron stores 16 bits.
_UINT16_VOCAB_SIZE = 65500
_FINGERPRINT_TOKENS = 1 << 14
_REWRITE = "write it again with `megatron-dlm preprocess`, or copy it again from its source"


def shard_dtype(vocab_size: int) -> type[np.generic]:
    """Megatron's choice of integer for a vocabulary."""
    return np.uint16 if vocab_size < _UINT16_VOCAB_SIZE else np.int32


class Shard:
    """Read-only view of one shard; opening it checks the sizes and reads no tokens."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._index_path = Path(f"{self.prefix}.idx")
        self._bin_path = Path(f"{self.prefix}.bin")
        for path in (self._index_path, self._bin_path):
            if not path.is_file():
                raise ValueError(
                    f"shard file {path} does not exist; give the path without .bin/.idx, or make "
                    "the shard with `megatron-dlm preprocess`"
                )
        self._open_index()
        self._open_tokens()
        self.manifest = Manifest.read(self.prefix)
        self._check_manifest()

    def _open_index(self) -> None:
        path, size_bytes = self._index_path, self._index_path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(
                f"{path} is truncated: {size_bytes} bytes, the header alone takes {_HEADER.size}; "
                + _REWRITE
            )
        magic, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(
                f"{path} is not a Megatron index (magic {magic!r}, version {version}, dtype code "
                f"{code}); give the prefix of a .bin/.idx pair"
            )
        expected_bytes = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size_bytes != expected_bytes or num_bounds == 0:
            state = "truncated" if size_bytes < expected_bytes else "not a plain text index"
            raise ValueError(
                f"{path} is {state}: {size_bytes} bytes, its header announces {expected_bytes} for "
                f"{num_sequences} sequences; {_REWRITE}"
            )
        raw = np.memmap(path, mode="r", dtype=np.uint8)
        pointers_at = _HEADER.size + 4 * num_sequences
        bounds_at = pointers_at + 8 * num_sequences
        self.dtype = np.dtype(_DTYPES[code])
        self._lengths = raw[_HEADER.size : pointers_at].view("<i4")
        self._pointers = raw[pointers_at:bounds_at].view("<i8")
        self._bounds = raw[bounds_at:].view("<i8")
        if self._bounds[0] != 0 or self._bounds[-1] != num_sequences:
            raise ValueError(
                f"{path} is damaged: its documents span sequences {self._bounds[0]} to "
                f"{self._bounds[-1]}, the index holds {num_sequences}; {_REWRITE}"
            )

    def _open_tokens(self) -> None:
        path, size_bytes = self._bin_path, self._bin_path.stat().st_size
        expected_bytes = 0
        if len(self._lengths):
            expected_bytes = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size_bytes != expected_bytes:
            state = "truncated" if size_bytes < expected_bytes else "longer than its index"
            raise ValueError(
                f"{path} is {state}: {size_bytes} bytes, {self._index_path} announces "
                f"{expected_bytes}; {_REWRITE}"
            )
        self.num_tokens = size_bytes // self.dtype.itemsize
        empty = np.zeros(0, dtype=self.dtype)
        self._tokens: np.ndarray = (
            np.memmap(path, mode="r", dtype=self.dtype) if size_bytes else empty
        )

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        found = (self.num_tokens, self.num_documents)
        announced = (self.manifest.tokens, self.manifest.documents)
        if found != announced:
            raise ValueError(
                f"shard {self.prefix} changed since its manifest: {found[0]} tokens in {found[1]} "
                f"documents, the manifest announces {announced[0]} in {announced[1]}; {_REWRITE}"
            )

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """int64: first token of each document; `num_documents` is allowed and gives the end."""
        sequences = np.asarray(self._bounds[documents])
        starts = np.full(sequences.shape, self.num_tokens, dtype=np.int64)
        inside = sequences < len(self._pointers)
        starts[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Token ids [start, start + length) in file order, as a view of the mmap."""
        assert 0 <= start <= self.num_tokens - length, (start, length)
        return self._tokens[start : start + length]

    def fingerprint(self) -> str:
        """sha256 of both ends of the token file: cheap at any size, different for other text."""
        count = min(self.num_tokens, _FINGERPRINT_TOKENS)
        ends = (self.tokens(0, count), self.tokens(self.num_tokens - count, count))
        return hashlib.sha256(b"".join(end.tobytes() for end in ends)).hexdigest()

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document, as a view of the mmap."""
        start, end = self.document_starts(np.array([number, number + 1]))
        return self.tokens(int(start), int(end - start))


class ShardWriter:
    """Streams documents to a shard; nothing appears under the final names before `publish`.

    Use as a context manager: leaving it without `publish` removes the temporary file.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        tokenizer_sha256: str | None = None,
        eod_id: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.vocab_size, self.mask_id = vocab_size, mask_id
        self.tokenizer_sha256, self.eod_id = tokenizer_sha256, eod_id
        self.dtype = np.dtype(shard_dtype(vocab_size))
        self.num_tokens = 0
        self._max_token_id = -1
        self._lengths = array("i")
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(f"{self.prefix}.bin.tmp")
        self._stream: Any = self._temporary.open("wb", buffering=1 << 20)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents that lie back to back in `tokens`."""
        assert len(tokens) == sum(lengths), (len(tokens), sum(lengths))
        if len(tokens):
            self._check_ids(tokens)
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def add_document(self, tokens: np.ndarray) -> None:
        self.add_documents(tokens, [len(tokens)])

    def _check_ids(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"shard {self.prefix}: token id {low if low < 0 else high} is outside the "
                f"vocabulary of {self.vocab_size}; use the tokenizer that made the ids"
            )
        if self.mask_id is not None and (tokens == self.mask_id).any():
            raise ValueError(
                f"shard {self.prefix}: the text holds the mask id {self.mask_id}; reserve an id "
                "that encoding text never gives"
            )
        self._max_token_id = max(self._max_token_id, high)

    def publish(self, source: Sequence[str] = ()) -> None:
        """Make the shard appear: .bin, then .idx, and the manifest last."""
        _sync(self._stream)
        index_temporary = Path(f"{self.prefix}.idx.tmp")
        with index_temporary.open("wb") as stream:
            self._write_index(stream)
            _sync(stream)
        # An older shard of this name must not be taken for whole while its files are replaced.
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(self._temporary, f"{self.prefix}.bin")
        os.replace(index_temporary, f"{self.prefix}.idx")
        Manifest(
            vocab_size=self.vocab_size,
            tokens=self.num_tokens,
            documents=self.num_documents,
            dtype=self.dtype.name,
            tokenizer_sha256=self.tokenizer_sha256,
            eod_id=self.eod_id,
            mask_id=self.mask_id,
            max_token_id=self._max_token_id,
            source=list(source),
        ).write(self.prefix)

    def _write_index(self, stream: Any) -> None:
        code = next(code for code, dtype in _DTYPES.items() if self.dtype == dtype)
        lengths = np.frombuffer(self._lengths, dtype="<i4") if self._lengths else np.zeros(0, "<i4")
        count = len(lengths)
        pointers = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
        for part in (lengths, pointers, np.arange(count + 1, dtype="<i8")):
            stream.write(part.tobytes())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        for suffix in (".bin.tmp", ".idx.tmp"):
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)


def _sync(stream: Any) -> None:
    """Reach the disk before a rename makes the file visible."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
