"""One job of `data split`: read a few shards, give every document to its side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dlm.data.preprocessing.shard_set import (
    is_done,
    shard_prefix,
    valid_prefix,
    whole_parts,
)
from megatron_dlm.data.storage.dataset import Facts, ShardEntry
from megatron_dlm.data.storage.document_blocks import DocumentBlock, document_digests, read_blocks
from megatron_dlm.data.storage.manifest import HeldOut, Manifest, Origin, Source
from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.data.storage.shards import Shard

# In the order of publishing: the shard for training is the last and makes a part whole.
SIDES: tuple[Literal["valid"], Literal["train"]] = ("valid", "train")


@dataclass(frozen=True)
class SplitJob:
    """The shards that one process splits, and how."""

    number: int
    num_jobs: int
    entries: tuple[ShardEntry, ...]
    facts: Facts
    """What the new manifests say."""
    final_id: int | None
    """An id that does not count at the end of a document."""
    output_prefix: str
    fraction: float
    shard_size_bytes: int
    origin_sha256: str
    recipe_sha256: str

    @property
    def size_bytes(self) -> int:
        return sum(entry.bin_bytes for entry in self.entries)

    def shard(self, side: str, part: int) -> str:
        """Prefix of one of the shards that it writes."""
        prefix = valid_prefix(self.output_prefix) if side == "valid" else self.output_prefix
        return shard_prefix(prefix, self.number, part)


@dataclass(frozen=True)
class Share:
    """What went to one side."""

    documents: int = 0
    tokens: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.documents + other.documents, self.tokens + other.tokens)


def run_split_job(job: SplitJob, advance: Callable[[int], None]) -> dict[str, Share]:
    """Write the shards of the job, or find them whole; returns what went to each side."""
    parts = whole_parts(job.output_prefix, job.number, job.recipe_sha256)
    if is_done(parts):
        advance(job.size_bytes)
    else:
        _write(job, advance)
        parts = whole_parts(job.output_prefix, job.number, job.recipe_sha256)
        assert is_done(parts), job
    held = [Manifest.read(job.shard("valid", part)) for part in range(len(parts))]
    return {"valid": _share([found for found in held if found]), "train": _share(parts)}


def is_held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """bool [n]: a document is held out if its hash is small; a larger share holds a smaller one."""
    return digests < np.uint64(int(fraction * 2.0**64))


def _write(job: SplitJob, advance: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        parts = _Parts(job, stack)
        for entry in job.entries:
            shard = Shard(entry.prefix)
            for block in read_blocks(shard):
                parts.add(block, shard)
                advance(block.tokens.nbytes)
        parts.publish(is_last=True)


class _Parts:
    """The shards that a job is writing, one for each side, and then those of its next part."""

    def __init__(self, job: SplitJob, stack: ExitStack) -> None:
        self._job, self._stack, self._part = job, stack, 0
        self._begin()

    def add(self, block: DocumentBlock, shard: Shard) -> None:
        """Give every document of the block to its side."""
        if self._writers["train"].num_bytes >= self._job.shard_size_bytes:
            self.publish(is_last=False)
            self._part += 1
            self._begin()
        held = is_held_out(document_digests(block, self._job.final_id), self._job.fraction)
        lengths = np.diff(block.bounds)
        for side, chosen in (("valid", held), ("train", ~held)):
            tokens = block.tokens[np.repeat(chosen, lengths)]
            self._writers[side].add_documents(tokens, lengths[chosen])
        begin = block.start * shard.dtype.itemsize
        source = self._sources.get(shard.prefix, Source(f"{shard.prefix}.bin", begin, begin))
        self._sources[shard.prefix] = Source(source.file, source.begin, begin + block.tokens.nbytes)

    def publish(self, *, is_last: bool) -> None:
        """Make both shards of the part appear."""
        job = self._job
        origin = Origin(
            sha256=job.origin_sha256,
            recipe_sha256=job.recipe_sha256,
            job=job.number,
            num_jobs=job.num_jobs,
            part=self._part,
            is_last=is_last,
        )
        for side in SIDES:
            held_out = HeldOut(job.fraction, side, by="tokens")
            sources = list(self._sources.values())
            self._writers[side].publish(sources, held_out=held_out, origin=origin)

    def _begin(self) -> None:
        self._sources: dict[str, Source] = {}
        self._writers: dict[str, ShardWriter] = {
            side: self._stack.enter_context(self._open(side)) for side in SIDES
        }

    def _open(self, side: str) -> ShardWriter:
        facts = self._job.facts
        assert facts.vocab_size is not None
        return ShardWriter(
            self._job.shard(side, self._part),
            vocab_size=facts.vocab_size,
            tokenizer_sha256=facts.tokenizer_sha256,
            eod_id=facts.eod_id,
            mask_id=facts.mask_id,
        )


def _share(manifests: Sequence[Manifest]) -> Share:
    return sum((Share(found.documents, found.tokens) for found in manifests), Share())
