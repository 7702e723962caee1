"""A dataset (a tier of a blend): one shard, or many listed in `<prefix>.dataset.json`.

Opening one compares the sizes of its files with the list and reads nothing else; a shard is mapped
into memory when it is first used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.data.storage.manifest import HeldOut, Manifest
from megatron_dlm.data.storage.shards import Shard
from megatron_dlm.runtime.files import contained, write_whole
from megatron_dlm.runtime.seals import SEAL, sealed

FORMAT = 1
# A mapped shard holds two file descriptors; this many are left to everything else.
_OTHER_FILES = 256
_FIELDS = frozenset(("format", "tokens", "documents", "facts", "shards", SEAL))
# Facts that the shards of one dataset need not share.
_MAY_DIFFER = frozenset(("max_token_id", "origin_sha256", "recipe_sha256"))


@dataclass(frozen=True)
class Facts:
    """What all shards of a dataset have in common; None where no manifest says it, or not all the
    same."""

    vocab_size: int | None = None
    tokenizer_sha256: str | None = None
    eod_id: int | None = None
    mask_id: int | None = None
    max_token_id: int | None = None
    """Largest id that occurs."""
    origin_sha256: str | None = None
    """Digest of the text that the shards were made from."""
    recipe_sha256: str | None = None
    """Digest of that text and of how it became shards: two different shards of one recipe share
    no text."""
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a dataset."""

    prefix: str
    """Path without .bin/.idx."""
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str | None
    """None for a shard without a manifest."""


class Dataset:
    """The shards of one dataset in order; made by `open_dataset`."""

    def __init__(self, prefix: str, entries: Sequence[ShardEntry], facts: Facts) -> None:
        self.prefix, self.entries, self.facts = prefix, list(entries), facts
        self.num_tokens = sum(entry.tokens for entry in entries)
        self.num_documents = sum(entry.documents for entry in entries)
        self._shards: dict[int, Shard] = {}

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first token of each shard, and the end."""
        return _starts([entry.tokens for entry in self.entries])

    @cached_property
    def first_documents(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first document of each shard, and the end."""
        return _starts([entry.documents for entry in self.entries])

    def shard(self, place: int) -> Shard:
        """The shard at this place of the list, mapped at first use.

        Raises ValueError where it is damaged or not the one of the list.
        """
        if place not in self._shards:
            entry = self.entries[place]
            shard = Shard(entry.prefix)
            if (shard.num_tokens, shard.num_documents) != (entry.tokens, entry.documents):
                raise ValueError(_changed(self.prefix, entry, shard))
            self._shards[place] = shard
        return self._shards[place]

    def fingerprint(self) -> str:
        """sha256 that differs for other text; reads no file whose checksum is known."""
        sums = [
            entry.bin_sha256 or self.shard(place).fingerprint()
            for place, entry in enumerate(self.entries)
        ]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def dataset_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.dataset.json")


def open_dataset(prefix: str | os.PathLike[str]) -> Dataset:
    """Open `<prefix>.dataset.json`, else the shard `<prefix>.bin/.idx`.

    Raises ValueError where neither is there, or where a listed shard is missing, cut or replaced.
    """
    entries, facts = whole_entries(prefix)
    _allow_open_files(2 * len(entries))
    return Dataset(os.fspath(prefix), entries, facts)


def whole_entries(prefix: str | os.PathLike[str]) -> tuple[list[ShardEntry], Facts]:
    """The shards of a dataset, their sizes compared; errors as those of `open_dataset`.

    Makes no room for open files, so more shards than a process may map can be gone through.
    """
    path = dataset_path(prefix)
    if not path.is_file():
        _explain_missing(os.fspath(prefix))
        return describe([prefix])
    entries, facts = read_list(prefix)
    for entry in entries:
        _check_sizes(path, entry)
    return entries, facts


def read_list(prefix: str | os.PathLike[str]) -> tuple[list[ShardEntry], Facts]:
    """What `<prefix>.dataset.json` says; its shards are not looked at."""
    path = dataset_path(prefix)
    remedy = f"write it again with `megatron-dlm data merge --output_prefix {prefix}`"
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}, this version reads {FORMAT}")
        strange = sorted(fields.keys() - _FIELDS)
        if strange:
            raise ValueError(f"it has an unknown field {strange[0]!r}")
        facts = _facts_from_json(fields["facts"])
        entries = [
            ShardEntry(**{**shard, "prefix": _prefix_below(path.parent, shard["prefix"])})
            for shard in fields["shards"]
        ]
        _check_counts(entries, fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of shards ({error}); {remedy}") from None
    return entries, facts


def write_dataset(
    prefix: str | os.PathLike[str], shards: Iterable[str | os.PathLike[str]]
) -> Dataset:
    """List the shards that hold text in `<prefix>.dataset.json`; see `describe` for errors.

    Raises ValueError where a shard has the name of the list (the prefix would mean two things), or
    lies in a directory that is not below the list's.
    """
    path = dataset_path(prefix)
    refuse_shard_named_like_list(prefix)
    entries, facts = describe(shards)
    entries = [entry for entry in entries if entry.tokens]
    base = path.parent.resolve()
    listed = [
        {**asdict(entry), "prefix": _relative_prefix(path, base, entry.prefix)} for entry in entries
    ]
    content = {
        "format": FORMAT,
        "tokens": sum(entry.tokens for entry in entries),
        "documents": sum(entry.documents for entry in entries),
        "facts": asdict(facts),
        "shards": listed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(sealed(content), indent=1) + "\n")
    return Dataset(os.fspath(prefix), entries, facts)


def _prefix_below(directory: Path, prefix: str) -> str:
    """The path of a listed shard. ValueError where it, or a file of it, is elsewhere."""
    for suffix in (".bin", ".idx"):
        contained(directory, f"{prefix}{suffix}")
    return str(directory / prefix)


def _relative_prefix(path: Path, base: Path, prefix: str) -> str:
    # Of the files, not of the prefix: they may be links to another place.
    file = Path(f"{prefix}.bin").resolve()
    if not file.is_relative_to(base):
        raise ValueError(
            f"shard {file} is not below {base}, where {path.name} would be; a list only names "
            "shards below itself: choose an output_prefix in a directory above them all, or "
            "--copy true"
        )
    return os.path.relpath(Path(prefix).resolve(), base)


def refuse_shard_named_like_list(prefix: str | os.PathLike[str]) -> None:
    """Raise ValueError where `<prefix>.bin` or `.idx` is in the way of a list of shards."""
    for shard_file in (Path(f"{os.fspath(prefix)}{suffix}") for suffix in (".bin", ".idx")):
        if shard_file.exists():
            raise ValueError(
                f"{dataset_path(prefix)} cannot be written beside {shard_file}, a shard of the "
                "same name; remove that shard, or choose another output_prefix"
            )


def describe(shards: Iterable[str | os.PathLike[str]]) -> tuple[list[ShardEntry], Facts]:
    """The entries of shards and what they have in common.

    Raises ValueError where two shards were made by different tokenizers or settings.
    """
    entries: list[ShardEntry] = []
    known: dict[str, tuple[Any, str]] = {}
    max_token_ids: list[int | None] = []
    for prefix in shards:
        shard = Shard(prefix)
        manifest = shard.manifest
        entries.append(_entry(shard))
        max_token_ids.append(manifest.max_token_id if manifest else None)
        for name, value in asdict(_facts_of(manifest)).items() if manifest else ():
            first = known.setdefault(name, (value, shard.prefix))
            if name not in _MAY_DIFFER and first[0] != value:
                raise ValueError(
                    f"shards do not fit together: {name} is {first[0]} in {first[1]} and {value} "
                    f"in {shard.prefix}; preprocess both with the same settings"
                )
            if first[0] != value:
                known[name] = (None, shard.prefix)
    common = {name: value for name, (value, _) in known.items()}
    largest = [number for number in max_token_ids if number is not None]
    is_known = bool(largest) and len(largest) == len(max_token_ids)
    common["max_token_id"] = max(largest) if is_known else None
    return entries, _facts_from_json(common)


def refuse_overlap(train: Sequence[Dataset], valid: Sequence[Dataset]) -> None:
    """Raise ValueError where a validation dataset holds text that a training dataset holds too."""
    for dataset, held, what in overlaps(train, valid):
        raise ValueError(
            f"data.train {dataset.prefix} and data.valid {held.prefix} overlap: both hold {what}; "
            "hold documents out with `megatron-dlm data split` or with preprocess "
            "--validation_fraction"
        )


def overlaps(
    first: Sequence[Dataset], second: Sequence[Dataset]
) -> Iterator[tuple[Dataset, Dataset, str]]:
    """Datasets of each side that hold the same text, and what it is."""
    for one, other in itertools.product(first, second):
        what = overlap(one, other)
        if what is not None:
            yield one, other, what


def overlap(first: Dataset, second: Dataset) -> str | None:
    """A shard or the input files that both datasets hold, in words; reads no token."""
    sums = {entry.bin_sha256 for entry in first.entries} - {None}
    paths = {os.path.realpath(entry.prefix) for entry in first.entries}
    for entry in second.entries:
        if os.path.realpath(entry.prefix) in paths or entry.bin_sha256 in sums:
            return entry.prefix
    return "the same input files" if _same_side(first.facts, second.facts) else None


def _same_side(train: Facts, valid: Facts) -> bool:
    """Both come from the same inputs, and not as the two sides of one split."""
    if train.origin_sha256 is None or train.origin_sha256 != valid.origin_sha256:
        return False
    mine, theirs = train.held_out, valid.held_out
    if mine == theirs:
        # Within one recipe only a shard that both list is an overlap, and none was found.
        return train.recipe_sha256 is None or train.recipe_sha256 != valid.recipe_sha256
    return (
        mine is None or theirs is None or (mine.fraction, mine.by) != (theirs.fraction, theirs.by)
    )


def _entry(shard: Shard) -> ShardEntry:
    return ShardEntry(
        prefix=shard.prefix,
        tokens=shard.num_tokens,
        documents=shard.num_documents,
        bin_bytes=os.stat(f"{shard.prefix}.bin").st_size,
        idx_bytes=os.stat(f"{shard.prefix}.idx").st_size,
        bin_sha256=shard.manifest.bin_sha256 if shard.manifest else None,
    )


def _facts_of(manifest: Manifest) -> Facts:
    return Facts(
        vocab_size=manifest.vocab_size,
        tokenizer_sha256=manifest.tokenizer_sha256,
        eod_id=manifest.eod_id,
        mask_id=manifest.mask_id,
        max_token_id=manifest.max_token_id,
        origin_sha256=manifest.origin.sha256 if manifest.origin else None,
        recipe_sha256=manifest.origin.recipe_sha256 if manifest.origin else None,
        held_out=manifest.held_out,
    )


def _facts_from_json(fields: dict[str, Any]) -> Facts:
    held_out = fields.get("held_out")
    return Facts(**{**fields, "held_out": HeldOut(**held_out) if held_out else None})


def _check_counts(entries: Sequence[ShardEntry], fields: dict[str, Any]) -> None:
    for entry in entries:
        counts = (entry.tokens, entry.documents, entry.bin_bytes, entry.idx_bytes)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{entry.prefix} has the counts {counts}")
    for name in ("tokens", "documents"):
        total = sum(getattr(entry, name) for entry in entries)
        if fields[name] != total:
            raise ValueError(f"{name} is {fields[name]}, its shards have {total}")


def _check_sizes(path: Path, entry: ShardEntry) -> None:
    for suffix, announced in ((".bin", entry.bin_bytes), (".idx", entry.idx_bytes)):
        file = f"{entry.prefix}{suffix}"
        try:
            found = os.stat(file).st_size
        except FileNotFoundError:
            raise ValueError(
                f"shard file {file} does not exist, but {path} lists it; copy it there again, or "
                "run the preprocess command again"
            ) from None
        if found != announced:
            raise ValueError(
                f"shard file {file} has {found} bytes, {path} announces {announced}: it is not "
                "whole, or was replaced; copy it again, or run the preprocess command again"
            )


def _changed(dataset: str, entry: ShardEntry, shard: Shard) -> str:
    return (
        f"shard {entry.prefix} changed since {dataset_path(dataset)}: {shard.num_tokens} tokens in "
        f"{shard.num_documents} documents, listed are {entry.tokens} in {entry.documents}; list it "
        f"again with `megatron-dlm data merge --output_prefix {dataset}`"
    )


def _explain_missing(prefix: str) -> None:
    """Say so where only numbered shards are there: the run that made them did not finish."""
    if Path(f"{prefix}.idx").exists():
        return
    parent, name = Path(prefix).parent, Path(prefix).name
    if parent.is_dir() and any(parent.glob(f"{name}_[0-9]*.manifest.json")):
        raise ValueError(
            f"dataset {prefix} is not finished: its shards are there, {dataset_path(prefix)} is "
            "not; run the preprocess command again to go on, or, after all array tasks are done, "
            f"`megatron-dlm data merge --output_prefix {prefix}`"
        )


def _starts(sizes: Sequence[int]) -> np.ndarray:
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(np.array(sizes, dtype=np.int64), out=starts[1:])
    return starts


def _allow_open_files(count: int) -> None:
    """Make room for `count` more open files; ValueError where the hard limit is below that.

    Every dataset adds its own: shards are opened later than all datasets are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
        if hard < count + _OTHER_FILES:
            raise ValueError(
                f"the shards need {count + _OTHER_FILES} open files, this process may open {hard}; "
                "raise `ulimit -Hn` or join the shards with `megatron-dlm data merge --copy true`"
            )
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
