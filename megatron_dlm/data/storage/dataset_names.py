"""From what a user names (prefixes, files of a shard, globs) to datasets and their shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable

from megatron_dlm.data.storage.dataset import dataset_path, read_list, whole_entries

_ENDINGS = (".dataset.json", ".manifest.json", ".bin", ".idx")
_NUMBER = re.compile(r"(\d+)")


def find_datasets(inputs: Iterable[str]) -> list[str]:
    """Prefixes of all datasets that are named, in order; those of a glob in order of their numbers.

    A glob leaves out shards that a list which it matches too holds. Raises ValueError where a glob
    matches nothing or where a dataset is named twice.
    """
    found: dict[str, str] = {}
    prefixes = []
    for name in inputs:
        for prefix in _expand(name):
            place = os.path.realpath(prefix)
            if place in found:
                raise ValueError(f"input names {prefix} twice (as {found[place]} and as {name})")
            found[place] = name
            prefixes.append(prefix)
    return prefixes


def find_shards(inputs: Iterable[str]) -> list[str]:
    """Prefixes of the shards of all datasets that are named, in order.

    Raises ValueError where a shard is missing or would be there twice.
    """
    owners: dict[str, str] = {}
    shards = []
    for name in find_datasets(inputs):
        for entry in whole_entries(name)[0]:
            place = os.path.realpath(entry.prefix)
            if place in owners:
                raise ValueError(
                    f"shard {entry.prefix} is in {owners[place]} and in {name}; name it once"
                )
            owners[place] = name
            shards.append(entry.prefix)
    return shards


def _expand(name: str) -> list[str]:
    prefix, ending = _split_ending(os.path.expanduser(name))
    if _exists(prefix) or not glob.has_magic(prefix):
        return [prefix]
    endings = {"": (".idx", ".dataset.json"), ".dataset.json": (".dataset.json",)}
    files = [
        file
        for wanted in endings.get(ending, (".idx",))
        for file in glob.glob(prefix + wanted, recursive=True)
    ]
    if not files:
        raise ValueError(
            f"input {name} matches no shard and no list of shards; name files that end in .idx or "
            ".dataset.json"
        )
    prefixes = {_split_ending(file)[0] for file in files}
    listed = {
        os.path.realpath(entry.prefix)
        for match in prefixes
        if dataset_path(match).is_file()
        for entry in read_list(match)[0]
    }
    return sorted((p for p in prefixes if os.path.realpath(p) not in listed), key=_by_numbers)


def _split_ending(name: str) -> tuple[str, str]:
    for ending in _ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _exists(prefix: str) -> bool:
    return dataset_path(prefix).is_file() or os.path.isfile(f"{prefix}.idx")


def _by_numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    """part_10 after part_9."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], name
