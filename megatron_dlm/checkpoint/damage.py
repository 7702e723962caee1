"""Whether the files of a checkpoint still are what was written."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.checkpoint.checksums import hash_files
from megatron_dlm.checkpoint.retention import Checkpoint


def check(checkpoint: Checkpoint) -> None:
    """Raise ValueError naming the first file that is not what was written."""
    problems = damage(checkpoint, sorted(checkpoint.checksums))
    if problems:
        raise ValueError(
            f"{checkpoint.path} is damaged: {problems[0]}; restore the file or name another "
            "checkpoint"
        )


def damage(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """What is wrong with these files, a line for each; OSError where one cannot be read at all."""
    found = hash_files(checkpoint.path, names)
    return [
        f"{name} does not have the checksum that was written"
        for name in names
        if found[name] != checkpoint.checksums[name]
    ]
