"""The `data merge` command: one dataset of many shards, listed where they are or copied."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console

from megatron_dlm.config.data_commands import MergeConfig
from megatron_dlm.data.commands.counting import print_datasets
from megatron_dlm.data.commands.reading_progress import reading_progress
from megatron_dlm.data.commands.shard_check import check_index
from megatron_dlm.data.preprocessing.shard_set import finish, valid_prefix
from megatron_dlm.data.storage.dataset import Facts, describe, open_dataset, write_dataset
from megatron_dlm.data.storage.dataset_names import find_shards
from megatron_dlm.data.storage.manifest import Manifest, Origin, total_text_bytes
from megatron_dlm.data.storage.shard_writer import ShardFiles, index_header
from megatron_dlm.data.storage.shards import Shard

_COPY_BYTES = 1 << 22
_INDEX_ITEMS = 1 << 18


def merge(config: MergeConfig) -> None:
    """Write `<output_prefix>.dataset.json`, or with `copy` one .bin/.idx, and print what it holds.

    Raises ValueError where jobs of the run are missing, or where the shards do not fit together.
    """
    prefix = config.output_prefix
    names = [prefix]
    if not config.input:
        _finish(prefix, config.array_count)
        shown = [prefix, valid_prefix(prefix)]
        names = [name for name in shown if os.path.exists(f"{name}.dataset.json")]
    elif config.copy:
        shards = find_shards(config.input)
        size_bytes = sum(os.stat(f"{shard}.bin").st_size for shard in shards)
        with reading_progress("copying", size_bytes) as advance:
            join_shards(shards, prefix, advance)
    else:
        shards = find_shards(config.input)
        if not any(entry.tokens for entry in describe(shards)[0]):
            raise ValueError(f"input {', '.join(config.input)} holds no token; name other shards")
        write_dataset(prefix, shards)
    print_datasets(Console(), [open_dataset(name) for name in names])


def join_shards(
    shards: Sequence[str],
    prefix: str | os.PathLike[str],
    advance: Callable[[int], None] = lambda size_bytes: None,
) -> Manifest | None:
    """Copy shards back to back into one, byte for byte as Megatron's builder merges them.

    Memory does not grow with them; nothing has its final name before all is copied. `advance` is
    told of bytes copied. Returns the manifest of the new shard; None, and none is written, where
    one of the shards has none. Raises ValueError where they do not fit together, or where one is
    damaged or changed since its manifest.
    """
    prefix = os.fspath(prefix)
    entries, facts = describe(shards)
    dtypes = {Shard(shard).dtype.name: shard for shard in shards}
    if len(dtypes) != 1:
        kinds = ", ".join(f"{name} in {shard}" for name, shard in dtypes.items())
        raise ValueError(f"shards cannot be copied into one: they store {kinds or 'nothing'}")
    if os.path.realpath(prefix) in {os.path.realpath(shard) for shard in shards}:
        raise ValueError(f"output_prefix {prefix} is one of the shards to copy; choose another")
    with ShardFiles(prefix) as files:
        for shard in shards:
            _copy_tokens(Shard(shard), files, advance)
        bin_sha256, idx_sha256 = files.publish(_joined_index(shards))
        manifests = [Manifest.read(shard) for shard in shards]
        known = [manifest for manifest in manifests if manifest is not None]
        if len(known) < len(manifests):
            return None
        assert facts.vocab_size is not None
        assert facts.max_token_id is not None
        manifest = Manifest(
            vocab_size=facts.vocab_size,
            tokens=sum(entry.tokens for entry in entries),
            documents=sum(entry.documents for entry in entries),
            dtype=next(iter(dtypes)),
            tokenizer_sha256=facts.tokenizer_sha256,
            eod_id=facts.eod_id,
            mask_id=facts.mask_id,
            max_token_id=facts.max_token_id,
            bin_sha256=bin_sha256,
            idx_sha256=idx_sha256,
            sources=[source for manifest in known for source in manifest.sources],
            text_bytes=total_text_bytes(known),
            left_out=dict(sum((Counter(manifest.left_out) for manifest in known), Counter())),
            held_out=facts.held_out,
            origin=_joined_origin(known, facts),
        )
        manifest.write(prefix)
    return manifest


def _finish(prefix: str, array_count: int | None) -> None:
    missing = finish(prefix)
    if not missing:
        return
    if array_count is None:
        who = "(in an array of N tasks, task `job modulo N`: give --array_count N to see them)"
    else:
        tasks = sorted({job % array_count for job in missing})
        who = f"(in an array of {array_count}: tasks {_listed(tasks)}, counted from 0)"
    raise ValueError(
        f"{len(missing)} jobs of the run {prefix} are not done: {_listed(missing)}; run the "
        f"preprocess command again, which keeps all that is whole {who}"
    )


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:20])
    return shown if len(numbers) <= 20 else f"{shown} and {len(numbers) - 20} more"


def _copy_tokens(shard: Shard, files: ShardFiles, advance: Callable[[int], None]) -> None:
    check_index(shard)
    digest = hashlib.sha256()
    with open(f"{shard.prefix}.bin", "rb") as stream:
        while part := stream.read(_COPY_BYTES):
            digest.update(part)
            files.append(part)
            advance(len(part))
    if shard.manifest is not None and digest.hexdigest() != shard.manifest.bin_sha256:
        raise ValueError(
            f"{shard.prefix}.bin changed since its manifest; copy it again, or preprocess again"
        )


def _joined_index(shards: Sequence[str]) -> Iterator[bytes]:
    """The .idx of all shards back to back, in pieces; each array is gone through by itself.

    Every pass opens one shard at a time: more of them than files may be open can be joined.
    """
    num_sequences = num_documents = 0
    for shard in map(Shard, shards):
        num_sequences += len(shard.sequence_lengths)
        num_documents += shard.num_documents
    dtype = Shard(shards[0]).dtype
    yield index_header(dtype, num_sequences=num_sequences, num_documents=num_documents)
    for shard in map(Shard, shards):
        yield from _pieces(shard.sequence_lengths)
    begin_bytes = 0
    for shard in map(Shard, shards):
        yield from _pieces(shard.sequence_pointers, begin_bytes)
        begin_bytes += shard.num_tokens * shard.dtype.itemsize
    yield np.zeros(1, dtype="<i8").tobytes()
    first_sequence = 0
    for shard in map(Shard, shards):
        yield from _pieces(shard.document_bounds[1:], first_sequence)
        first_sequence += len(shard.sequence_lengths)


def _pieces(numbers: np.ndarray, offset: int = 0) -> Iterator[bytes]:
    for first in range(0, len(numbers), _INDEX_ITEMS):
        yield (numbers[first : first + _INDEX_ITEMS] + numbers.dtype.type(offset)).tobytes()


def _joined_origin(manifests: Sequence[Manifest], facts: Facts) -> Origin | None:
    """The text that all shards come from; as a recipe of its own, the copy is none of them."""
    origins = [manifest.origin for manifest in manifests]
    if facts.origin_sha256 is None or None in origins:
        return None
    parts = [(origin.recipe_sha256, origin.job, origin.part) for origin in origins if origin]
    recipe = json.dumps(["joined", *parts])
    return Origin(
        sha256=facts.origin_sha256,
        recipe_sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        job=0,
        num_jobs=1,
        part=0,
        is_last=True,
    )
