"""Documents that two sets of datasets have in common, token for token."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_dlm.data.commands.shard_workers import map_shards
from megatron_dlm.data.storage.dataset import Dataset, ShardEntry
from megatron_dlm.data.storage.document_blocks import document_digests, read_blocks, text_bounds
from megatron_dlm.data.storage.shards import Shard

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SharedDocuments:
    """How much text two sets of datasets share, and where; empty documents are left out."""

    num_train_documents: int
    """Documents of the first set that the second one holds too."""
    num_valid_documents: int
    """Documents of the second set that the first one holds too."""
    compared_documents: int
    """Documents of both sets."""
    example: str | None
    """The first pair, in words."""


@dataclass(frozen=True)
class _Task:
    prefix: str
    eod_id: int | None
    """For a shard whose manifest does not say."""


def find_shared(
    train: Sequence[Dataset], valid: Sequence[Dataset], *, eod_id: int | None, workers: int
) -> SharedDocuments:
    """Compare every document of one set with all of the other.

    Takes some 50 bytes of memory for each document of the smaller set. Raises ValueError where the
    ids of the two were made by different tokenizers.
    """
    _check_tokenizers([*train, *valid])
    num_train = sum(dataset.num_documents for dataset in train)
    is_train_small = num_train < sum(dataset.num_documents for dataset in valid)
    small, large = (train, valid) if is_train_small else (valid, train)
    with tempfile.TemporaryDirectory() as folder:
        index = _Index.build(Path(folder), small, eod_id=eod_id, workers=workers)
        digests = index.column("digests")
        hits = np.zeros(len(digests), dtype=bool)
        num_large, example, num_compared = 0, None, len(digests)
        matching = _map(partial(_match, index), large, eod_id, workers, "comparing")
        for match in matching:
            hits[match.ranks] = True
            num_large += match.num_documents
            num_compared += match.num_compared
            example = example or match.example
        # Documents of the small set with equal digests are equal: each of them is shared.
        num_small = int(np.isin(digests, digests[hits]).sum())
    return SharedDocuments(
        num_train_documents=num_small if is_train_small else num_large,
        num_valid_documents=num_large if is_train_small else num_small,
        compared_documents=num_compared,
        example=example,
    )


@dataclass(frozen=True)
class _Match:
    """What one shard of the larger set has in common with the smaller set."""

    ranks: np.ndarray
    """int64: places of the shared digests in the index."""
    num_documents: int
    num_compared: int
    example: str | None


@dataclass(frozen=True)
class _Index:
    """The documents of the smaller set by digest, in files that all processes map."""

    folder: Path
    prefixes: tuple[str, ...]

    @staticmethod
    def build(
        folder: Path, datasets: Sequence[Dataset], *, eod_id: int | None, workers: int
    ) -> _Index:
        found = list(_map(_digests, datasets, eod_id, workers, "reading"))
        digests = np.concatenate([digests for digests, _ in found])
        order = np.argsort(digests, kind="stable")
        shards = np.repeat(np.arange(len(found)), [len(digests) for digests, _ in found])
        documents = np.concatenate([documents for _, documents in found])
        for name, column in (("digests", digests), ("shards", shards), ("documents", documents)):
            np.save(folder / f"{name}.npy", column[order])
        return _Index(folder, tuple(entry.prefix for entry in _entries(datasets)))

    def column(self, name: str) -> np.ndarray:
        """digests: uint64, sorted; shards, documents: the place of each in `prefixes`."""
        column: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return column


def _digests(task: _Task, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """uint64, int64: digest and number of every document that is not empty."""
    shard, eod_id = _open(task)
    digests, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for block in read_blocks(shard):
        starts, ends = text_bounds(block, eod_id)
        full = np.flatnonzero(ends > starts)
        digests.append(document_digests(block, eod_id)[full])
        documents.append(block.first + full)
        advance(block.tokens.nbytes)
    return np.concatenate(digests), np.concatenate(documents)


def _match(index: _Index, task: _Task, advance: Callable[[int], None]) -> _Match:
    shard, eod_id = _open(task)
    known, shards, documents = map(index.column, ("digests", "shards", "documents"))
    opened = _Opened(task.eod_id)
    ranks: list[int] = []
    num_compared, example = 0, None
    for block in read_blocks(shard):
        starts, ends = text_bounds(block, eod_id)
        full = np.flatnonzero(ends > starts)
        num_compared += len(full)
        digests = document_digests(block, eod_id)[full]
        rank = np.searchsorted(known, digests)
        hit = np.flatnonzero(rank < len(known))
        hit = hit[known[rank[hit]] == digests[hit]]
        for mine, at in zip(full[hit].tolist(), rank[hit].tolist(), strict=True):
            prefix, other = index.prefixes[shards[at]], int(documents[at])
            if np.array_equal(block.tokens[starts[mine] : ends[mine]], opened.text(prefix, other)):
                ranks.append(at)
                here = f"document {block.first + mine} of {task.prefix}"
                example = example or f"{here} is document {other} of {prefix}"
        advance(block.tokens.nbytes)
    return _Match(np.unique(np.array(ranks, dtype=np.int64)), len(ranks), num_compared, example)


class _Opened:
    """Documents of shards that stay open."""

    def __init__(self, eod_id: int | None) -> None:
        self._eod_id = eod_id
        self._shards: dict[str, tuple[Shard, int | None]] = {}

    def text(self, prefix: str, document: int) -> np.ndarray:
        """Ids of the document without a final end-of-document token."""
        if prefix not in self._shards:
            self._shards[prefix] = _open(_Task(prefix, self._eod_id))
        shard, eod_id = self._shards[prefix]
        ids = shard.document(document)
        return ids[:-1] if len(ids) and ids[-1] == eod_id else ids


def _open(task: _Task) -> tuple[Shard, int | None]:
    shard = Shard(task.prefix)
    return shard, task.eod_id if shard.manifest is None else shard.manifest.eod_id


def _entries(datasets: Sequence[Dataset]) -> list[ShardEntry]:
    return [entry for dataset in datasets for entry in dataset.entries]


def _map(
    function: Callable[[_Task, Callable[[int], None]], _Result],
    datasets: Sequence[Dataset],
    eod_id: int | None,
    workers: int,
    label: str,
) -> Iterator[_Result]:
    entries = _entries(datasets)
    return map_shards(
        function,
        [_Task(entry.prefix, eod_id) for entry in entries],
        sizes_bytes=[entry.bin_bytes for entry in entries],
        workers=workers,
        label=label,
    )


def _check_tokenizers(datasets: Sequence[Dataset]) -> None:
    known = {dataset.facts.tokenizer_sha256: dataset.prefix for dataset in datasets}
    known.pop(None, None)
    if len(known) > 1:
        first, second, *_ = known.values()
        raise ValueError(
            f"{first} and {second} were made by different tokenizers, so that equal text has other "
            "ids; compare datasets of one tokenizer"
        )
