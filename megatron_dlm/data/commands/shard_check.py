"""Whether one shard is sound: its index, its ids, the ends of its documents, its checksums."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.data.storage.dataset import Facts, ShardEntry
from megatron_dlm.data.storage.document_blocks import DocumentBlock, read_blocks
from megatron_dlm.data.storage.manifest import Manifest, manifest_path
from megatron_dlm.data.storage.shards import Shard
from megatron_dlm.runtime.errors import is_users
from megatron_dlm.runtime.seals import SEAL, is_sealed

_INDEX_ITEMS = 1 << 18
_FILE_BYTES = 1 << 22
_AS_WRITTEN = "it was written like that: preprocess again with the right tokenizer"
_COPY = "its bytes changed after it was written: copy it again, or preprocess again"


@dataclass(frozen=True)
class Rules:
    """What holds for every document of a shard; None: not known."""

    vocab_size: int | None = None
    eod_id: int | None = None
    """Every document ends in this id."""
    mask_id: int | None = None
    """Occurs nowhere."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to check and what is said about it elsewhere."""

    prefix: str
    entry: ShardEntry | None = None
    """Its line in the list of its dataset."""
    facts: Facts | None = None
    """What that list says of all its shards."""
    rules: Rules = Rules()
    """For a shard without a manifest."""
    index_only: bool = False


@dataclass(frozen=True)
class ShardVerdict:
    """What was found."""

    prefix: str
    problem: str | None
    """None: the shard is sound."""
    documents: int = 0
    tokens: int = 0
    checked: tuple[str, ...] = ()
    """What was compared, out of: list, index, ids, ends, checksums."""


def check_shard(task: ShardTask, advance: Callable[[int], None]) -> ShardVerdict:
    """Look for the first thing that is wrong; `advance` is told of bytes read: of the .bin, or
    of the .idx alone."""
    try:
        shard = Shard(task.prefix)
        checked = ["index"]
        if task.entry is not None:
            _check_against_list(shard, task.entry, task.facts)
            checked.append("list")
        check_index(shard)
        manifest = shard.manifest
        if manifest is not None and _file_sha256(f"{shard.prefix}.idx") != manifest.idx_sha256:
            raise ValueError(f"{shard.prefix}.idx does not have its manifest's checksum; {_COPY}")
        if task.index_only:
            advance(os.stat(f"{shard.prefix}.idx").st_size)
        else:
            checked += _check_tokens(shard, _rules_of(manifest, task.rules), advance)
        if manifest is not None:
            refuse_changed(manifest_path(shard.prefix))
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        return ShardVerdict(task.prefix, " ".join(str(error).split()))
    return ShardVerdict(
        task.prefix, None, shard.num_documents, shard.num_tokens, tuple(sorted(checked))
    )


def refuse_changed(path: Path) -> None:
    """Raise ValueError for a manifest or a list that does not have its own checksum; those of
    older versions hold none."""
    content = parse_json(path.read_text(encoding="utf-8"))
    if SEAL in content and not is_sealed(content):
        raise ValueError(f"{path} was changed: its own checksum is wrong; {_COPY}")


def check_index(shard: Shard) -> None:
    """Raise ValueError for the first document whose place is wrong: lengths are at least 0,
    sequences follow each other without a gap, and documents begin in order."""
    bounds, lengths, pointers = (
        shard.document_bounds,
        shard.sequence_lengths,
        shard.sequence_pointers,
    )
    path = f"{shard.prefix}.idx"
    for first in range(0, len(bounds) - 1, _INDEX_ITEMS):
        steps = np.diff(bounds[first : first + _INDEX_ITEMS + 1])
        for place in np.flatnonzero(steps < 0)[:1]:
            raise ValueError(
                f"{path}: document {first + place} begins at sequence {bounds[first + place]} and "
                f"ends before it, at {bounds[first + place + 1]}"
            )
    for first in range(0, len(lengths), _INDEX_ITEMS):
        last = min(first + _INDEX_ITEMS, len(lengths))
        sizes = lengths[first:last].astype(np.int64)
        ends = pointers[first:last] + sizes * shard.dtype.itemsize
        wrong = sizes < 0
        following = len(pointers[first + 1 : last + 1])
        wrong[:following] |= ends[:following] != pointers[first + 1 : last + 1]
        for place in np.flatnonzero(wrong)[:1]:
            sequence = first + int(place)
            raise ValueError(
                f"{path}: document {bisect_right(bounds, sequence) - 1} (sequence {sequence}) has "
                f"{sizes[place]} tokens from byte {pointers[sequence]}, but the next begins at "
                f"byte {pointers[min(sequence + 1, len(pointers) - 1)]}"
            )


def _rules_of(manifest: Manifest | None, otherwise: Rules) -> Rules:
    if manifest is None:
        return otherwise
    return Rules(manifest.vocab_size, manifest.eod_id, manifest.mask_id)


def _check_against_list(shard: Shard, entry: ShardEntry, facts: Facts | None) -> None:
    manifest = shard.manifest
    found: dict[str, Any] = {"tokens": shard.num_tokens, "documents": shard.num_documents}
    announced: dict[str, Any] = {"tokens": entry.tokens, "documents": entry.documents}
    for suffix in ("bin", "idx"):
        found[f"{suffix}_bytes"] = Path(f"{shard.prefix}.{suffix}").stat().st_size
        announced[f"{suffix}_bytes"] = getattr(entry, f"{suffix}_bytes")
    found["bin_sha256"] = manifest.bin_sha256 if manifest else None
    announced["bin_sha256"] = entry.bin_sha256
    if manifest is not None and facts is not None:
        for name in ("vocab_size", "tokenizer_sha256", "eod_id", "mask_id", "held_out"):
            found[name], announced[name] = getattr(manifest, name), getattr(facts, name)
        for name, theirs in (("origin_sha256", "sha256"), ("recipe_sha256", "recipe_sha256")):
            if getattr(facts, name) is not None:  # None: the shards are of several runs
                found[name] = getattr(manifest.origin, theirs, None)
                announced[name] = getattr(facts, name)
    for name, value in found.items():
        if value != announced[name]:
            raise ValueError(
                f"shard {shard.prefix} is not the one of its dataset's list: {name} is {value}, "
                f"the list says {announced[name]}; list it again with `megatron-dlm data merge`"
            )


def _check_tokens(shard: Shard, rules: Rules, advance: Callable[[int], None]) -> list[str]:
    """Read all tokens once; returns what was checked, raises ValueError for the first problem."""
    manifest, problem, largest = shard.manifest, None, -1
    digest = hashlib.sha256()
    for block in read_blocks(shard):
        digest.update(block.tokens.data)
        if len(block.tokens):
            largest = max(largest, int(block.tokens.max()))
        problem = problem or _first_problem(shard, block, rules)
        advance(block.tokens.nbytes)
        if problem and manifest is None:
            break
    is_intact = manifest is not None and digest.hexdigest() == manifest.bin_sha256
    if problem:
        hint = _AS_WRITTEN if is_intact else _COPY
        raise ValueError(f"{problem}; {hint}" if manifest else problem)
    if manifest is not None and not is_intact:
        raise ValueError(f"{shard.prefix}.bin does not have its manifest's checksum; {_COPY}")
    if manifest is not None and largest != manifest.max_token_id:
        raise ValueError(
            f"shard {shard.prefix}: the largest id is {largest}, its manifest says "
            f"{manifest.max_token_id}; preprocess again"
        )
    known = {
        "ids": rules.vocab_size is not None,
        "ends": rules.eod_id is not None,
        "checksums": manifest is not None,
    }
    return [name for name, is_known in known.items() if is_known]


def _first_problem(shard: Shard, block: DocumentBlock, rules: Rules) -> str | None:
    """The first bad document of the block, in words."""
    found: list[tuple[int, str]] = []
    token = _first_bad_id(block.tokens, rules)
    if token is not None:
        place = bisect_right(block.bounds, token) - 1
        at = f"at its token {token - block.bounds[place]}"
        found.append(
            (place, f"{at} is id {block.tokens[token]}, {_why(block.tokens[token], rules)}")
        )
    place = -1 if rules.eod_id is None else _first_bad_end(block, rules.eod_id)
    if place >= 0:
        token = int(block.bounds[place + 1]) - 1
        is_empty = token < block.bounds[place]
        state = "it is empty" if is_empty else f"it ends in id {block.tokens[token]}"
        found.append((place, f"{state}, not in the end of document {rules.eod_id}"))
    if not found:
        return None
    place, what = min(found)
    begins_at = (block.start + int(block.bounds[place])) * shard.dtype.itemsize
    document = f"document {block.first + place} (from byte {begins_at} of the .bin)"
    return f"shard {shard.prefix}, {document}: {what}"


def _why(token: int, rules: Rules) -> str:
    if token < 0:
        return "which is negative"
    if token == rules.mask_id:
        return "the mask, which no text holds"
    return f"outside of the vocabulary of {rules.vocab_size}"


def _first_bad_id(tokens: np.ndarray, rules: Rules) -> int | None:
    """Place of the first id that must not be there."""
    if not len(tokens):
        return None
    limit = int(np.iinfo(tokens.dtype).max) if rules.vocab_size is None else rules.vocab_size - 1
    is_bad = int(tokens.min()) < 0 or int(tokens.max()) > limit
    if not is_bad and (rules.mask_id is None or not (tokens == rules.mask_id).any()):
        return None
    bad = (tokens < 0) | (tokens > limit)
    if rules.mask_id is not None:
        bad |= tokens == rules.mask_id
    return int(np.argmax(bad))


def _first_bad_end(block: DocumentBlock, eod_id: int) -> int:
    """The first document that does not end in the end-of-document token; -1 if all do."""
    starts, ends = block.bounds[:-1], block.bounds[1:]
    bad = ends == starts
    full = np.flatnonzero(~bad)
    bad[full] = block.tokens[ends[full] - 1] != eod_id
    return int(np.argmax(bad)) if bad.any() else -1


def _file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(_FILE_BYTES):
            digest.update(part)
    return digest.hexdigest()
