"""Datasets in which every token id occurs once, so that a token says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dlm.data.storage.dataset import Dataset, open_dataset, write_dataset
from megatron_dlm.data.storage.shard_writer import ShardWriter

VOCAB_SIZE, MASK_ID = 60_000, 4
FIRST_ID = 10


def write_unique(
    prefix: Path, lengths: Sequence[int], *, num_shards: int = 1, first_id: int = FIRST_ID
) -> Dataset:
    """Documents of these lengths with ids first_id, first_id + 1, … in file order.

    One shard is PREFIX.bin/.idx; several are listed in PREFIX.dataset.json.
    """
    names = [f"{prefix}_{number:05d}_000" for number in range(num_shards)]
    names = [str(prefix)] if num_shards == 1 else names
    token = first_id
    for name, part in zip(names, np.array_split(np.array(lengths), num_shards), strict=True):
        with ShardWriter(
            name, vocab_size=VOCAB_SIZE, tokenizer_sha256="aa", mask_id=MASK_ID
        ) as writer:
            writer.add_documents(np.arange(part.sum()) + token, part.tolist())
            writer.publish()
        token += int(part.sum())
    if num_shards > 1:
        write_dataset(prefix, names)
    return open_dataset(prefix)


def documents(lengths: Sequence[int], first_id: int = FIRST_ID) -> list[np.ndarray]:
    """The documents that `write_unique` writes."""
    ends = first_id + np.cumsum(lengths)
    return [
        np.arange(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)
    ]
