"""SHA-256 of files: about 1.7 GB/s a core, the sum that `sha256sum` prints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_dlm.runtime.processes import num_cores

_BLOCK_BYTES = 4 << 20
_MAX_THREADS = 8


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """name -> SHA-256 in hexadecimal of files of a directory, several at a time."""
    names = list(names)
    # hashlib works outside the interpreter's lock.
    with ThreadPoolExecutor(max(1, min(_MAX_THREADS, num_cores(), len(names)))) as pool:
        sums = pool.map(lambda name: _hash_file(directory / name), names)
        return dict(zip(names, sums, strict=True))


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while num_read := stream.readinto(block):
            digest.update(block[:num_read])
    return digest.hexdigest()
