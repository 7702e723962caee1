"""Which checkpoint directories are whole, which is the newest, and which are no longer kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.checksums import hash_files
from megatron_dlm.config.json_text import parse_json
from megatron_dlm.runtime.files import flush_to_disk, is_plain_name, write_whole
from megatron_dlm.runtime.seals import is_sealed, sealed

MANIFEST_NAME = "megatron_dlm.json"
LATEST_NAME = "latest_checkpointed_iteration.txt"
UNFINISHED_SUFFIX = ".unfinished"
DAMAGED_SUFFIX = ".damaged"
FORMAT = 2
# In the manifest of an imported checkpoint: it holds no optimizer state and saw no data of ours.
WEIGHTS_ONLY = "weights_only"
_POLL_SECONDS = 0.2
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def checksums(self) -> Mapping[str, str]:
        """File name -> SHA-256; empty in checkpoints of format 1, which has none."""
        return self.manifest.get("file_sha256", {})


def directory_name(step: int) -> str:
    """Megatron's name of the checkpoint taken after `step` updates."""
    return f"iter_{step:07d}"


def write_manifest(
    directory: Path,
    content: Mapping[str, Any],
    checksums: Mapping[str, str] | None = None,
    *,
    patience_seconds: float = 60.0,
) -> None:
    """The last file written into a checkpoint: what it holds, how large every file is, and its sum.

    `checksums` are those known already; the other files are read. Everything is on disk afterwards.
    Raises ValueError when a file with a known checksum does not show up in `patience_seconds`: what
    another host wrote may be seen late on a shared file system.
    """
    known = dict(checksums or {})
    deadline = time.monotonic() + patience_seconds
    while gone := sorted(known.keys() - {file.name for file in directory.iterdir()}):
        if time.monotonic() > deadline:
            raise ValueError(f"{directory / gone[0]} was written and is gone; mend the file system")
        time.sleep(_POLL_SECONDS)
    names = sorted(file.name for file in directory.iterdir() if file.name != MANIFEST_NAME)
    known |= hash_files(directory, [name for name in names if name not in known])
    for name in names:
        flush_to_disk(directory / name)
    files = {
        "file_bytes": {name: (directory / name).stat().st_size for name in names},
        "file_sha256": {name: known[name] for name in names},
    }
    text = json.dumps(sealed({"format": FORMAT, **content, **files}), indent=1)
    write_whole(directory / MANIFEST_NAME, text)
    flush_to_disk(directory)


def publish(unfinished: Path, step: int) -> Path:
    """Give a finished checkpoint its name, and say in the marker that it is the newest."""
    root = unfinished.parent
    target = root / directory_name(step)
    if target.exists():  # renamed first: at no time is there a half of either under the name
        replaced = unfinished.with_name(f"{unfinished.stem}.replaced{UNFINISHED_SUFFIX}")
        target.rename(replaced)
        unfinished.rename(target)
        _delete(replaced)
    else:
        unfinished.rename(target)
    flush_to_disk(root)
    write_whole(root / LATEST_NAME, f"{step}\n")
    return target


def whole_checkpoints(root: Path) -> tuple[list[Checkpoint], list[str]]:
    """Whole checkpoints under `root` by step, and a warning for each directory that is not.

    Whole by the manifest and the sizes of the files; their content is not read.
    """
    whole, warnings = [], []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        is_candidate = path.name.startswith("iter_") and not path.name.endswith(DAMAGED_SUFFIX)
        if is_candidate and path.is_dir():
            checkpoint, problem = _inspect(path)
            if checkpoint is not None:
                whole.append(checkpoint)
            if problem is not None:
                warnings.append(f"ignoring {path}: {problem}")
    return sorted(whole, key=lambda checkpoint: checkpoint.step), warnings


def _inspect(path: Path) -> tuple[Checkpoint | None, str | None]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None, "the save was interrupted"
    try:
        manifest = parse_json((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None, f"it has no readable {MANIFEST_NAME}"
    problem = _manifest_problem(manifest) or _size_problem(path, manifest["file_bytes"])
    return (None, problem) if problem else (Checkpoint(path, int(match.group(1)), manifest), None)


def _manifest_problem(manifest: Any) -> str | None:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("file_bytes"), dict):
        return f"{MANIFEST_NAME} is not the manifest of a checkpoint"
    if manifest.get("format") != 1 and not is_sealed(manifest):  # 1 had no checksums
        return f"{MANIFEST_NAME} was changed: its own checksum is wrong"
    strange = [name for name in manifest["file_bytes"] if not is_plain_name(name)]
    return f"{MANIFEST_NAME} names {strange[0]}, which leaves the directory" if strange else None


def _size_problem(path: Path, sizes: Mapping[str, int]) -> str | None:
    for name, expected in sizes.items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != expected:
            return f"{name} has {size} bytes, {expected} were written"
    return None


def was_saved(root: Path) -> bool:
    """Whether any save was ever finished here, be it whole, damaged or set aside now."""
    return any(not path.name.endswith(UNFINISHED_SUFFIX) for path in root.glob("iter_*"))


def mend_latest(newest: Checkpoint) -> str | None:
    """Make the marker name the newest checkpoint; returns what was wrong with it."""
    path = newest.path.parent / LATEST_NAME
    try:
        text = path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        text = None
    if text == str(newest.step):
        return None
    write_whole(path, f"{newest.step}\n")
    said = "was missing" if text is None else f"said {text[:20]!r}"
    return f"{path} {said}; it now says {newest.step}"


def remove_unfinished(root: Path) -> None:
    """Delete what interrupted saves and interrupted deletions left behind."""
    for path in root.glob(f"iter_*{UNFINISHED_SUFFIX}") if root.is_dir() else ():
        _delete(path)


def superfluous(
    whole: Sequence[Checkpoint], *, keep_last: int, keep_every_steps: int | None
) -> list[Checkpoint]:
    """All but the newest `keep_last` (0: all are kept) and every multiple of `keep_every_steps`."""
    if keep_last == 0:
        return []
    return [
        checkpoint
        for checkpoint in whole[:-keep_last]
        if keep_every_steps is None or checkpoint.step % keep_every_steps
    ]


def remove_old(root: Path, *, keep_last: int, keep_every_steps: int | None) -> None:
    """Delete the superfluous ones. What is not whole does not count, so a whole one is left."""
    whole, _ = whole_checkpoints(root)
    for checkpoint in superfluous(whole, keep_last=keep_last, keep_every_steps=keep_every_steps):
        remove(checkpoint)


def remove(checkpoint: Checkpoint) -> None:
    """Delete one; it loses its name first, so that no half of it is ever taken for whole."""
    doomed = checkpoint.path.with_name(checkpoint.path.name + UNFINISHED_SUFFIX)
    checkpoint.path.rename(doomed)
    _delete(doomed)


def set_aside(checkpoint: Checkpoint) -> Path:
    """Keep a damaged checkpoint under a name that nobody continues from; returns it."""
    number = 1
    target = checkpoint.path.with_name(checkpoint.path.name + DAMAGED_SUFFIX)
    while target.exists():
        number += 1
        target = checkpoint.path.with_name(f"{checkpoint.path.name}_{number}{DAMAGED_SUFFIX}")
    checkpoint.path.rename(target)
    return target


def _delete(path: Path) -> None:
    """What cannot be deleted now (open files on NFS) is left to the next start."""
    if path.is_symlink():
        os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)
