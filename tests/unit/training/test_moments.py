"""Moments of one optimizer are not given to another."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.schema import RunConfig, TrainConfig
from megatron_dlm.training.moments import check_moments


def checkpoint_of(config: RunConfig, **more: object) -> Checkpoint:
    """As its manifest is read again."""
    manifest = json.loads(json.dumps({"config": asdict(config), **more}))
    return Checkpoint(Path("run/checkpoints/iter_0000009"), 9, manifest)


def run(batch: int = 8, **optimizer: object) -> RunConfig:
    settings = OptimizerConfig(**optimizer)  # type: ignore[arg-type]
    return RunConfig(optimizer=settings, train=TrainConfig(global_batch_size=batch))


def test_other_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"iter_0000009 holds moments of optimizer.kind adamw, .*"):
        check_moments(checkpoint_of(run()), run(kind="laprop"))
    with pytest.raises(ValueError, match=r"of optimizer\.kind laprop, which mean nothing to adamw"):
        check_moments(checkpoint_of(run(kind="laprop")), run())


def test_imported_weights_have_no_moments() -> None:
    assert check_moments(checkpoint_of(run(), weights_only=True), run(kind="laprop")) == []


def test_other_horizon_is_told() -> None:
    assert check_moments(checkpoint_of(run(lr=1.0)), run(lr=2.0, weight_decay=0.0)) == []
    by_batch = {"adam_beta2": 0.9, "adam_beta2_by_batch": {16: 0.99}}
    small, large = run(8, **by_batch), run(16, **by_batch)
    assert check_moments(checkpoint_of(small), small) == []
    (warning,) = check_moments(checkpoint_of(small), large)
    assert "made with optimizer.adam_beta2 0.9, this run has 0.99" in warning
    assert check_moments(checkpoint_of(large), replace(large)) == []
