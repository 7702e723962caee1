"""Megatron's `.bin/.idx` shards, read through mmap; numpy only. `shard_writer` makes them.

`.bin` holds the token ids back to back. `.idx` holds, little-endian: 9 bytes magic, uint64 version,
uint8 dtype code, uint64 number of sequences n, uint64 number of document bounds m, int32 [n]
lengths, int64 [n] byte offsets, int64 [m] first sequence of each document and the end.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from bisect import bisect_right
from pathlib import Path

import numpy as np

from megatron_dlm.data.storage.manifest import Manifest

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
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
    """Read-only view of one shard; opening it checks the sizes and reads no tokens.

    A document is one or more sequences that follow each other. Damage inside the index is found
    where it is met: every method raises ValueError rather than give another place's tokens.

    sequence_lengths: int32 [sequences], in tokens. sequence_pointers: int64 [sequences], in bytes.
    document_bounds: int64 [documents + 1], first sequence of each document, and the end.
    """

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
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise ValueError(
                f"{path} is truncated: {size_bytes} bytes, the header alone takes {HEADER.size}; "
                + _REWRITE
            )
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(header)
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise ValueError(
                f"{path} is not a Megatron index (magic {magic!r}, version {version}, dtype code "
                f"{code}); give the prefix of a .bin/.idx pair"
            )
        expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size_bytes != expected_bytes or num_bounds == 0:
            state = "truncated" if size_bytes < expected_bytes else "not a plain text index"
            raise ValueError(
                f"{path} is {state}: {size_bytes} bytes, its header announces {expected_bytes} for "
                f"{num_sequences} sequences; {_REWRITE}"
            )
        raw = np.frombuffer(_map(path), dtype=np.uint8)
        pointers_at = HEADER.size + 4 * num_sequences
        bounds_at = pointers_at + 8 * num_sequences
        self.dtype = np.dtype(DTYPES[code])
        self.sequence_lengths = raw[HEADER.size : pointers_at].view("<i4")
        self.sequence_pointers = raw[pointers_at:bounds_at].view("<i8")
        self.document_bounds = raw[bounds_at:].view("<i8")
        begins_late = num_sequences > 0 and self.sequence_pointers[0] != 0
        if begins_late or self.document_bounds[0] != 0 or self.document_bounds[-1] != num_sequences:
            raise ValueError(
                f"{path} is damaged: its documents span sequences {self.document_bounds[0]} to "
                f"{self.document_bounds[-1]}, the index holds {num_sequences} sequences and they "
                f"must begin at byte 0; {_REWRITE}"
            )

    def _open_tokens(self) -> None:
        path, size_bytes = self._bin_path, self._bin_path.stat().st_size
        expected_bytes = 0
        if len(self.sequence_lengths):
            last_bytes = int(self.sequence_lengths[-1]) * self.dtype.itemsize
            expected_bytes = int(self.sequence_pointers[-1]) + last_bytes
        if size_bytes != expected_bytes or size_bytes % self.dtype.itemsize:
            state = "truncated" if size_bytes < expected_bytes else "longer than its index"
            if size_bytes == expected_bytes:
                state = f"not made of whole tokens of {self.dtype.itemsize} bytes"
            raise ValueError(
                f"{path} is {state}: {size_bytes} bytes, {self._index_path} announces "
                f"{expected_bytes}; {_REWRITE}"
            )
        self.num_tokens = size_bytes // self.dtype.itemsize
        self._bin_map = _map(path) if size_bytes else None
        self._reads_at_random = False
        self._tokens = np.frombuffer(self._bin_map or b"", dtype=self.dtype)

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        announced = self.manifest.tokens, self.manifest.documents, self.manifest.dtype
        found = self.num_tokens, self.num_documents, self.dtype.name
        if found != announced:
            raise ValueError(
                f"shard {self.prefix} changed since its manifest: {found[0]} tokens in {found[1]} "
                f"documents as {found[2]}, the manifest announces {announced[0]} in {announced[1]} "
                f"as {announced[2]}; {_REWRITE}"
            )

    @property
    def num_documents(self) -> int:
        return len(self.document_bounds) - 1

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """int64: first token of each document; `num_documents` is allowed and gives the end."""
        sequences = np.asarray(self.document_bounds[documents])
        if ((sequences < 0) | (sequences > len(self.sequence_pointers))).any():
            raise self._damaged(documents)
        starts = np.full(sequences.shape, self.num_tokens, dtype=np.int64)
        inside = sequences < len(self.sequence_pointers)
        starts[inside], rest = np.divmod(
            self.sequence_pointers[sequences[inside]], self.dtype.itemsize
        )
        if rest.any() or ((starts < 0) | (starts > self.num_tokens)).any():
            raise self._damaged(documents)
        return starts

    def document_spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64, int64: first token and number of tokens of each document."""
        starts = self.document_starts(documents)
        lengths = self.document_starts(documents + 1) - starts
        if (lengths < 0).any():
            raise self._damaged(documents)
        return starts, lengths

    def document_span(self, document: int) -> tuple[int, int]:
        """First token and number of tokens of one document; much faster than arrays of one."""
        first, after = (int(place) for place in self.document_bounds[document : document + 2])
        start, end = self._sequence_start(first, document), self._sequence_start(after, document)
        if start > end:
            raise self._damaged(np.array([document]))
        return start, end - start

    def _sequence_start(self, sequence: int, document: int) -> int:
        """First token of a sequence, or the end of the file."""
        if sequence == len(self.sequence_pointers):
            return self.num_tokens
        inside = 0 <= sequence < len(self.sequence_pointers)
        pointer = int(self.sequence_pointers[sequence]) if inside else -1
        start, rest = divmod(pointer, self.dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            raise self._damaged(np.array([document]))
        return start

    def document_at(self, token: int) -> int:
        """Number of the document that holds this token of the file."""
        assert 0 <= token < self.num_tokens, token
        # bisect reads a few places; searchsorted would copy these arrays, which are not aligned.
        sequence = bisect_right(self.sequence_pointers, token * self.dtype.itemsize) - 1
        document = bisect_right(self.document_bounds, sequence) - 1
        (start,), (length,) = self.document_spans(np.array([document]))
        if not start <= token < start + length:
            raise self._damaged(np.array([document]))
        return document

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Token ids [start, start + length) in file order, as a view of the mmap."""
        assert 0 <= start <= self.num_tokens - length, (start, length)
        if self._reads_at_random and length:
            self._request(start * self.dtype.itemsize, length * self.dtype.itemsize)
        return self._tokens[start : start + length]

    def expect_random_reads(self) -> None:
        """For readers of short stretches all over the file: each costs the disk its own pages only.

        The kernel's read-ahead is right for whole files; here it would read megabytes for each.
        """
        if self._bin_map is not None:
            self._bin_map.madvise(mmap.MADV_RANDOM)
            self._reads_at_random = True

    def _request(self, begin: int, num_bytes: int) -> None:
        """Have the pages read in one go instead of one by one as they are touched."""
        assert self._bin_map is not None, "an empty file has nothing to request"
        page = begin - begin % mmap.PAGESIZE
        self._bin_map.madvise(mmap.MADV_WILLNEED, page, begin + num_bytes - page)

    def fingerprint(self) -> str:
        """sha256 of both ends of the token file: cheap at any size, different for other text."""
        count = min(self.num_tokens, _FINGERPRINT_TOKENS)
        ends = (self.tokens(0, count), self.tokens(self.num_tokens - count, count))
        return hashlib.sha256(b"".join(end.tobytes() for end in ends)).hexdigest()

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document, as a view of the mmap."""
        (start,), (length,) = self.document_spans(np.array([number]))
        return self.tokens(int(start), int(length))

    def _damaged(self, documents: np.ndarray) -> ValueError:
        numbers = np.asarray(documents)
        return ValueError(
            f"{self._index_path} is damaged: what it says of documents {numbers.min()} to "
            f"{numbers.max()} lies outside of the shard or goes backwards; {_REWRITE}"
        )


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
