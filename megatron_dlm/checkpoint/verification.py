"""The newest checkpoint that still is what was written; a damaged one is not continued from.

Every byte is read once and summed, shared out over ranks and threads: about 1.7 GB/s a core, or
what the file system gives. The load that follows finds much of it in the page cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.damage import damage
from megatron_dlm.checkpoint.retention import Checkpoint, mend_latest
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.parallel import ParallelContext


def newest_sound(
    root: Path, parallel: ParallelContext, *, verify: Literal["checksums", "sizes"]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint under `root` and warnings; None before the first. Collective.

    No save may be under way: what interrupted ones left is removed. A checkpoint that is damaged is
    renamed to iter_N.damaged, and the next older is tried; the marker of the newest is mended.
    Raises ValueError on every rank when there are checkpoints and none is sound: to start from
    scratch beside them would lose the run.
    """
    found: tuple[list[Checkpoint], list[str], bool] = ([], [], False)
    with parallel.failing_together():
        if parallel.is_main:
            found = (*retention.whole_checkpoints(root), retention.was_saved(root))
            retention.remove_unfinished(root)
    whole, warnings, was_any = parallel.from_main(found)
    for checkpoint in reversed(whole):
        problems = _damage_over_ranks(checkpoint, parallel) if verify == "checksums" else []
        message: str | None = None
        with parallel.failing_together():
            if parallel.is_main:
                message = _set_aside(checkpoint, problems) if problems else mend_latest(checkpoint)
        message = parallel.from_main(message)
        warnings += [message] if message else []
        if not problems:
            return checkpoint, warnings
    if was_any:
        raise AgreedError(
            f"{root} holds checkpoints but none is sound: {'; '.join(warnings)}; bring one back, "
            "or set train.resume never to start anew (the old run is kept in previous_N/)"
        )
    return None, warnings


def _damage_over_ranks(checkpoint: Checkpoint, parallel: ParallelContext) -> list[str]:
    # Large files first, dealt out in turn: every rank gets its share of the bytes.
    sizes = checkpoint.manifest["file_bytes"]
    names = sorted(checkpoint.checksums, key=lambda name: (-sizes[name], name))
    mine: list[str] = []
    with parallel.failing_together():
        mine = damage(checkpoint, names[parallel.rank :: parallel.world_size])
    found: list[list[str]] = [[]] * parallel.world_size
    dist.all_gather_object(found, mine, group=parallel.control_group)
    return sorted(problem for problems in found for problem in problems)


def _set_aside(checkpoint: Checkpoint, problems: Sequence[str]) -> str:
    kept = retention.set_aside(checkpoint)
    return f"ignoring {checkpoint.path}: {', '.join(problems)}; it is kept as {kept.name}"
