"""The shards of one preprocess run: their names, which of them are whole, and their list.

A run is a row of jobs and a job writes one shard after the other, its parts:
PREFIX_{job}_{part}.bin/.idx/.manifest.json and, where documents are held out, the same with
PREFIX_valid. The manifest of a training shard is written last of all and makes the part whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_dlm.data.preprocessing.recipe import (
    Recipe,
    read_recipe,
    recipe_path,
    remove_unfinished_recipes,
    write_recipe,
)
from megatron_dlm.data.storage.dataset import dataset_path, write_dataset
from megatron_dlm.data.storage.manifest import Manifest, manifest_path
from megatron_dlm.data.storage.shards import HEADER

_SHARD = r"_(\d{5,})_(\d{3,})"


def shard_prefix(prefix: str, job: int, part: int) -> str:
    return f"{prefix}_{job:05d}_{part:03d}"


def valid_prefix(prefix: str) -> str:
    """The dataset of the held-out documents."""
    return f"{prefix}_valid"


def numbered_shards(prefix: str) -> list[tuple[int, int]]:
    """Job and part of every shard with a manifest, in order; whole or not."""
    directory, name = Path(prefix).parent, re.escape(Path(prefix).name)
    pattern = re.compile(rf"{name}{_SHARD}\.manifest\.json")
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted((int(m[1]), int(m[2])) for m in map(pattern.fullmatch, names) if m)


def whole_parts(prefix: str, job: int, recipe_sha256: str) -> list[Manifest]:
    """Manifests of the first parts of a job, up to the first that is not whole or of another run.

    The job is done if the last of them says `origin.is_last`.
    """
    parts: list[Manifest] = []
    while not parts or not is_done(parts):
        shard = shard_prefix(prefix, job, len(parts))
        manifest = Manifest.read(shard)
        if manifest is None or manifest.origin is None:
            break
        if manifest.origin.recipe_sha256 != recipe_sha256 or not _is_whole(shard, manifest):
            break
        held_out = shard_prefix(valid_prefix(prefix), job, len(parts))
        if _has_other_side(manifest) and not _is_whole(held_out, Manifest.read(held_out)):
            break
        parts.append(manifest)
    return parts


def is_done(parts: list[Manifest]) -> bool:
    """Whether these parts are all of their job."""
    return bool(parts) and parts[-1].origin is not None and parts[-1].origin.is_last


def completed_shards(prefix: str) -> tuple[list[str], list[int]]:
    """Shards of the jobs that are done, in order, and the numbers of the jobs that are not.

    Raises ValueError where there is no shard, or where shards of two runs lie side by side.
    """
    numbered = numbered_shards(prefix)
    if not numbered:
        raise ValueError(
            f"there is no shard {prefix}_00000_000; name the output_prefix of a preprocess command"
        )
    recipe_sha256, num_jobs = _run_of(shard_prefix(prefix, *numbered[0]))
    shards, missing = [], []
    for job in range(num_jobs):
        parts = whole_parts(prefix, job, recipe_sha256)
        if is_done(parts):
            shards += [shard_prefix(prefix, job, part) for part in range(len(parts))]
        else:
            missing.append(job)
    for shard in {shard_prefix(prefix, *place) for place in numbered} - set(shards):
        if _run_of(shard)[0] != recipe_sha256:
            raise ValueError(
                f"shard {shard} is of another run than {shard_prefix(prefix, *numbered[0])}; "
                "remove the shards of one of them"
            )
    return shards, missing


def finish(prefix: str) -> list[int]:
    """List all shards in PREFIX.dataset.json, and the held-out ones in PREFIX_valid.dataset.json.

    Returns the numbers of the jobs that are not done; then nothing is listed. May run in several
    processes at once. Raises ValueError where a dataset would have no document.
    """
    shards, missing = completed_shards(prefix)
    if missing:
        return missing
    datasets = {prefix: shards}
    first = Manifest.read(shards[0])
    if first is not None and _has_other_side(first):
        held = [valid_prefix(prefix) + shard[len(prefix) :] for shard in shards]
        datasets = {valid_prefix(prefix): held, prefix: shards}
    for name, listed in datasets.items():
        if not any(manifest.documents for manifest in map(Manifest.read, listed) if manifest):
            raise ValueError(
                f"no document fell to {name}; give more text, or change minimum_characters or "
                "validation_fraction and add --overwrite true"
            )
    with _alone(prefix):
        for name, listed in datasets.items():
            _list(name, listed)
    remove_unfinished_recipes(prefix)
    return []


def claim(prefix: str, recipe: Recipe) -> None:
    """Note the recipe beside the shards to come.

    Raises ValueError where the prefix is taken: by shards of another recipe, or by a single shard.
    """
    remedy = "name another output_prefix, or remove it"
    for side in (prefix, valid_prefix(prefix)) if recipe.validation_fraction else (prefix,):
        if Path(f"{side}.idx").exists():
            raise ValueError(f"shard {side}.bin/.idx is there already; {remedy}")
    held = valid_prefix(prefix)
    if recipe.validation_fraction and recipe_path(held).exists():
        raise ValueError(f"{held} is the dataset of another run ({recipe_path(held)}); {remedy}")
    known, numbered = read_recipe(prefix), numbered_shards(prefix)
    if known is not None:
        difference = recipe.first_difference(known)
    elif numbered and _run_of(shard_prefix(prefix, *numbered[0]))[0] == recipe.sha256:
        difference = None
    else:
        difference = f"{recipe_path(prefix)} is not there"
    if numbered and difference:
        raise ValueError(
            f"output_prefix {prefix} holds shards of another run: {difference}; name another "
            "output_prefix, or replace that run with --overwrite true"
        )
    if known is None or difference:
        write_recipe(prefix, recipe)


def remove_shards(prefix: str) -> None:
    """Remove all that a run left under this prefix, in an order in which no rest looks whole."""
    directory, name = Path(prefix).parent, re.escape(Path(prefix).name)
    held = valid_prefix(prefix)
    # PREFIX_valid may also be a run of its own.
    sides, both = ([prefix], "") if recipe_path(held).exists() else ([prefix, held], "(_valid)?")
    pattern = re.compile(rf"{name}{both}{_SHARD}\.(bin|idx|manifest\.json)(\.tmp)?")
    names = os.listdir(directory) if directory.is_dir() else []
    shards = [directory / found for found in names if pattern.fullmatch(found)]
    shards.sort(key=lambda path: ".manifest.json" not in path.name)
    for path in [*map(dataset_path, sides), *shards, recipe_path(prefix)]:
        path.unlink(missing_ok=True)


def is_output(path: Path, prefix: str) -> bool:
    """Whether a run with this prefix writes a file of this name, which is then no input."""
    name = re.escape(Path(prefix).name)
    ours = rf"{name}(_valid)?({_SHARD}\.manifest|\.dataset|\.recipe)\.json"
    return (
        re.fullmatch(ours, path.name) is not None
        and path.parent.resolve() == Path(prefix).parent.resolve()
    )


def _run_of(shard: str) -> tuple[str, int]:
    """Digest of the recipe that a shard was made by, and the number of jobs of that run."""
    manifest = Manifest.read(shard)
    if manifest is None or manifest.origin is None:
        raise ValueError(
            f"{manifest_path(shard)} names no preprocess run; move the shard to another name"
        )
    return manifest.origin.recipe_sha256, manifest.origin.num_jobs


def _has_other_side(manifest: Manifest) -> bool:
    """Whether a shard of held-out documents belongs to this one."""
    return manifest.held_out is not None and manifest.held_out.side == "train"


def _is_whole(shard: str, manifest: Manifest | None) -> bool:
    """Whether both files are there with the sizes that the manifest implies."""
    if manifest is None:
        return False
    expected = {
        ".bin": manifest.tokens * np.dtype(manifest.dtype).itemsize,
        ".idx": HEADER.size + 20 * manifest.documents + 8,  # a document is one sequence
    }
    try:
        return all(os.stat(f"{shard}{s}").st_size == size for s, size in expected.items())
    except FileNotFoundError:
        return False


def _list(name: str, shards: list[str]) -> None:
    try:
        write_dataset(name, shards)
    except FileNotFoundError:
        # Without locks another array task can have renamed the same list a moment earlier.
        if not dataset_path(name).exists():
            raise


@contextlib.contextmanager
def _alone(prefix: str) -> Iterator[None]:
    """One process at a time: the last array tasks may finish in the same instant."""
    try:
        stream = recipe_path(prefix).open("rb")
    except FileNotFoundError:  # copied shards, and nobody else at work
        yield
        return
    with stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
