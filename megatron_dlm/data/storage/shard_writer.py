"""Writes a `.bin/.idx` shard whole or not at all, byte for byte as Megatron's own builder does."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_dlm.data.storage.dataset import dataset_path
from megatron_dlm.data.storage.manifest import HeldOut, Manifest, Origin, Source, manifest_path
from megatron_dlm.data.storage.shards import DTYPES, HEADER, MAGIC, shard_dtype


class ShardFiles:
    """A .bin and .idx under temporary names; nothing has a final name before `publish`.

    Use as a context manager: leaving it without `publish` removes the temporary files. Raises
    ValueError where another process is writing the same shard.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._bin_hash = hashlib.sha256()
        self._is_published = False
        if dataset_path(self.prefix).exists():
            raise ValueError(
                f"shard {self.prefix} cannot be written beside {dataset_path(self.prefix)}, a list "
                "of the same name; remove that list, or choose another output_prefix"
            )
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_alone(Path(f"{self.prefix}.bin.tmp"))

    def append(self, data: bytes | memoryview) -> None:
        """Write more of the .bin."""
        self._bin_hash.update(data)
        self._bin.write(data)

    def publish(self, index: Iterable[bytes | memoryview]) -> tuple[str, str]:
        """Write the .idx, and make .bin and .idx appear: sha256 of both.

        The manifest of an older shard of this name is gone then; the caller writes the new one
        before the context ends, and with it the lock.
        """
        _sync(self._bin)
        index_hash = hashlib.sha256()
        with Path(f"{self.prefix}.idx.tmp").open("wb") as stream:
            for part in index:
                index_hash.update(part)
                stream.write(part)
            _sync(stream)
        # An older shard of this name must not be taken for whole while its files are replaced.
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(f"{self.prefix}.bin.tmp", f"{self.prefix}.bin")
        os.replace(f"{self.prefix}.idx.tmp", f"{self.prefix}.idx")
        self._is_published = True
        return self._bin_hash.hexdigest(), index_hash.hexdigest()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_published:
            for suffix in (".bin.tmp", ".idx.tmp"):
                Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        # What is still buffered belongs to a removed file; a full disk must not speak twice.
        with contextlib.suppress(OSError):
            self._bin.close()


class ShardWriter:
    """Streams documents to a shard; a context manager like its `ShardFiles`, same errors."""

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
        self._files = ShardFiles(self.prefix)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Size of the .bin."""
        return self.num_tokens * self.dtype.itemsize

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents that lie back to back in `tokens` (integers of any width)."""
        lengths = np.asarray(lengths, dtype=np.int32)
        assert len(tokens) == lengths.sum(dtype=np.int64), (len(tokens), lengths.sum())
        if len(tokens):
            self._check_ids(tokens)
        stored = np.ascontiguousarray(tokens, dtype=self.dtype)
        self._files.append(stored.data)
        self._lengths.frombytes(lengths.tobytes())
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

    def publish(
        self,
        sources: Sequence[Source] = (),
        *,
        text_bytes: int | None = None,
        left_out: Mapping[str, int] | None = None,
        held_out: HeldOut | None = None,
        origin: Origin | None = None,
    ) -> Manifest:
        """Make the shard appear: .bin, then .idx, and the manifest last."""
        bin_sha256, idx_sha256 = self._files.publish(self._index())
        manifest = Manifest(
            vocab_size=self.vocab_size,
            tokens=self.num_tokens,
            documents=self.num_documents,
            dtype=self.dtype.name,
            tokenizer_sha256=self.tokenizer_sha256,
            eod_id=self.eod_id,
            mask_id=self.mask_id,
            max_token_id=self._max_token_id,
            bin_sha256=bin_sha256,
            idx_sha256=idx_sha256,
            sources=list(sources),
            text_bytes=text_bytes,
            left_out=dict(left_out or {}),
            held_out=held_out,
            origin=origin,
        )
        manifest.write(self.prefix)
        self._files.__exit__()  # and with it the lock
        return manifest

    def _index(self) -> Iterable[bytes | memoryview]:
        lengths = np.frombuffer(self._lengths, dtype="<i4") if self._lengths else np.zeros(0, "<i4")
        count = len(lengths)
        pointers = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        yield index_header(self.dtype, num_sequences=count, num_documents=count)
        yield from (lengths.data, pointers.data, np.arange(count + 1, dtype="<i8").data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)


def index_header(dtype: np.dtype, *, num_sequences: int, num_documents: int) -> bytes:
    """What an .idx begins with; int32 lengths, int64 pointers and int64 bounds follow."""
    code = next(code for code, known in DTYPES.items() if dtype == known)
    return HEADER.pack(MAGIC, 1, code, num_sequences, num_documents + 1)


def _open_alone(path: Path) -> BinaryIO:
    """Open for writing and lock: the rest of a killed run is overwritten, a living one is not."""
    while True:
        stream = path.open("ab", buffering=1 << 20)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ValueError(
                f"{path} is being written by another process; wait for it, or stop it first"
            ) from None
        except OSError:
            pass  # a file system without locks
        if _is_still(path, stream):
            stream.truncate(0)
            return stream
        stream.close()  # its writer published or removed it between the opening and the lock


def _is_still(path: Path, stream: BinaryIO) -> bool:
    """Whether the open file has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _sync(stream: Any) -> None:
    """Reach the disk before a rename makes the file visible."""
    stream.flush()
    os.fsync(stream.fileno())
