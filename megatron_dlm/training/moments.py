"""Whether the moments in a checkpoint mean the same to this run's optimizer."""

from __future__ import annotations

from dataclasses import fields

from megatron_dlm.checkpoint.retention import WEIGHTS_ONLY, Checkpoint
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.schema import RunConfig

# The scale of a moment follows from these; another value forgets the old one within its horizon.
_HORIZONS = ("adam_beta1", "adam_beta2")


def check_moments(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Warnings about settings that change what stored moments mean.

    Raises ValueError where they would be taken for something else: LaProp's first moment is of
    normalised gradients, Adam's of gradients.
    """
    manifest = checkpoint.manifest
    if manifest.get(WEIGHTS_ONLY):
        return []
    stored = _stored_optimizer(manifest["config"]["optimizer"])
    if stored.kind != config.optimizer.kind:
        raise ValueError(
            f"{checkpoint.path} holds moments of optimizer.kind {stored.kind}, which mean nothing "
            f"to {config.optimizer.kind}; use {stored.kind}, or begin with its weights alone "
            "(megatron-dlm export, then import)"
        )
    before = stored.for_batch(manifest["config"]["train"]["global_batch_size"])
    now = config.optimizer.for_batch(config.train.global_batch_size)
    return [
        f"{checkpoint.path} was made with optimizer.{name} {getattr(before, name)}, this run has "
        f"{getattr(now, name)}: the first updates mix both"
        for name in _HORIZONS
        if getattr(before, name) != getattr(now, name)
    ]


def _stored_optimizer(values: dict[str, object]) -> OptimizerConfig:
    known = {field.name for field in fields(OptimizerConfig)}
    kept = {name: value for name, value in values.items() if name in known}
    by_batch = kept.get("adam_beta2_by_batch")
    if isinstance(by_batch, dict):  # JSON has made text of its keys
        kept["adam_beta2_by_batch"] = {int(size): beta for size, beta in by_batch.items()}
    return OptimizerConfig(**kept)  # type: ignore[arg-type]
