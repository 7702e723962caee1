"""Which checkpoint directories are whole, which is the newest, and which are no longer kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.runtime.files import write_whole

MANIFEST_NAME = "megatron_dlm.json"
LATEST_NAME = "latest_checkpointed_iteration.txt"
UNFINISHED_SUFFIX = ".unfinished"
# In the manifest of an imported checkpoint: it holds no optimizer state and saw no data of ours.
WEIGHTS_ONLY = "weights_only"
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    step: int
    manifest: Mapping[str, Any]


def directory_name(step: int) -> str:
    """Megatron's name of the checkpoint taken after `step` updates."""
    return f"iter_{step:07d}"


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """The last file written into a checkpoint: what it holds and how large every file is."""
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    write_whole(directory / MANIFEST_NAME, json.dumps({**content, "file_bytes": sizes}, indent=1))


def whole_checkpoints(root: Path) -> tuple[list[Checkpoint], list[str]]:
    """Whole checkpoints under `root` by step, and a warning for each directory that is not."""
    whole, warnings = [], []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_dir() and path.name.startswith("iter_"):
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
        manifest = json.loads((path / MANIFEST_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return None, f"it has no readable {MANIFEST_NAME}"
    for name, expected in manifest["file_bytes"].items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != expected:
            return None, f"{name} has {size} bytes, {expected} were written"
    return Checkpoint(path, int(match.group(1)), manifest), None


def remove_unfinished(root: Path) -> None:
    """Delete what interrupted saves and interrupted deletions left behind."""
    for path in root.glob(f"iter_*{UNFINISHED_SUFFIX}") if root.is_dir() else ():
        shutil.rmtree(path)


def remove_old(root: Path, *, keep_last: int, keep_every_steps: int | None) -> None:
    """Delete all but the newest `keep_last` and every multiple of `keep_every_steps`."""
    if keep_last == 0:
        return
    whole, _ = whole_checkpoints(root)
    for checkpoint in whole[:-keep_last]:
        if keep_every_steps is None or checkpoint.step % keep_every_steps:
            doomed = checkpoint.path.with_name(checkpoint.path.name + UNFINISHED_SUFFIX)
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)
