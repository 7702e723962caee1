"""Shards of a few documents, written by the package or by Megatron's own builder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.data.storage.manifest import HeldOut, Origin
from megatron_dlm.data.storage.shard_writer import ShardWriter

EOD, MASK, VOCAB_SIZE = 1, 2, 500
Documents = Sequence[Sequence[int]]


def random_documents(count: int, seed: int = 0, *, longest: int = 40) -> list[list[int]]:
    """Texts of random ids that end in EOD."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, longest, size=count)
    return [[*draw.integers(3, VOCAB_SIZE, size=size).tolist(), EOD] for size in sizes]


def write_shard(
    prefix: Path,
    documents: Documents,
    *,
    held_out: HeldOut | None = None,
    origin: Origin | None = None,
    left_out: dict[str, int] | None = None,
    text_bytes: int | None = None,
    **settings: Any,
) -> str:
    """One shard with a manifest; returns its prefix. `settings` are those of ShardWriter."""
    known = {"vocab_size": VOCAB_SIZE, "eod_id": EOD, "mask_id": MASK, "tokenizer_sha256": "t"}
    with ShardWriter(prefix, **{**known, **settings}) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.publish(held_out=held_out, origin=origin, left_out=left_out, text_bytes=text_bytes)
    return str(prefix)


def origin_of(text: str, recipe: str, *, job: int = 0, part: int = 0) -> Origin:
    """Where a shard comes from; its job is the whole run."""
    return Origin(text, recipe, job=job, num_jobs=1, part=part, is_last=True)


def write_megatron_shard(
    prefix: Path, documents: Sequence[Documents], dtype: type[np.generic] = np.int32
) -> str:
    """Documents of several sequences each, written by Megatron's builder; no manifest."""
    import torch
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        ids = [token for sequence in sequences for token in sequence]
        lengths = [len(sequence) for sequence in sequences]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def all_documents(prefixes: Sequence[str]) -> list[list[int]]:
    """Every document of shards, read by Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = []
    for prefix in prefixes:
        shard = IndexedDataset(prefix)
        for first, last in itertools.pairwise(shard.document_indices.tolist()):
            found.append([token for i in range(first, last) for token in shard[i].tolist()])
    return found
