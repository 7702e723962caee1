"""`megatron-dlm checkpoint prune`: delete the checkpoints that a rule does not keep."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.damage import check
from megatron_dlm.checkpoint.run_lock import RunLock
from megatron_dlm.config.checkpoint_commands import CheckpointPruneConfig
from megatron_dlm.data.commands.report_file import in_bytes


def prune(config: CheckpointPruneConfig) -> None:
    """Delete and say what; nothing is deleted unless the newest one to keep is sound."""
    run = Path(config.run)
    root = run / "checkpoints"
    if not root.is_dir():
        raise ValueError(f"{run} is no run directory: it has no checkpoints/")
    with RunLock(run):
        whole, warnings = retention.whole_checkpoints(root)
        for warning in warnings:
            print(warning)
        if not whole:
            raise ValueError(f"{root} holds no whole checkpoint; nothing is deleted")
        check(whole[-1])
        doomed = [
            checkpoint
            for checkpoint in retention.superfluous(
                whole, keep_last=config.keep_last, keep_every_steps=config.keep_every_steps
            )
            if checkpoint.step not in config.keep_steps
        ]
        verb = "would delete" if config.dry_run else "deleting"
        for checkpoint in doomed:
            size = in_bytes(sum(checkpoint.manifest["file_bytes"].values()))
            print(f"{verb} {checkpoint.path} ({size})", flush=True)
            if not config.dry_run:
                retention.remove(checkpoint)
        for path in _leftovers(root, damaged=config.damaged):
            print(f"{verb} {path}", flush=True)
            if not config.dry_run:
                shutil.rmtree(path)
    kept = [str(checkpoint.step) for checkpoint in whole if checkpoint not in doomed]
    print(f"{'would be kept' if config.dry_run else 'kept'}: steps {', '.join(kept)}")


def _leftovers(root: Path, *, damaged: bool) -> list[Path]:
    """Interrupted saves, and if asked for what was set aside."""
    suffixes = [retention.UNFINISHED_SUFFIX, *([retention.DAMAGED_SUFFIX] if damaged else [])]
    return sorted(path for suffix in suffixes for path in root.glob(f"iter_*{suffix}"))
