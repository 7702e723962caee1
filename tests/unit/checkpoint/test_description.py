"""Which runs may go on from a checkpoint, by what it says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from small_checkpoints import write_step

from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.checkpoint.store import check_description, without_absent_extras
from megatron_dlm.config.architecture import ModelConfig, weight_settings

MODEL = ModelConfig(vocab_size=100)


def said_by(model: ModelConfig, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    settings = weight_settings(model)
    values = {name: value for name, value in settings.items() if name not in without}
    return {"model": values, "data": {"digest": "d"}}


def checkpoint_of(description: dict[str, Any]) -> Checkpoint:
    manifest = {**description, "config": {"model": description["model"]}}
    return Checkpoint(Path("runs/a/checkpoints/iter_0000007"), 7, manifest)


def test_the_same_model_goes_on() -> None:
    check_description(checkpoint_of(said_by(MODEL)), said_by(MODEL))


def test_an_option_that_came_later_had_its_default() -> None:
    older = checkpoint_of(said_by(MODEL, without=("attention_sink", "residual_multiplier")))
    check_description(older, said_by(MODEL))
    message = "made with model.residual_multiplier 1.0, this run has 0.5"
    with pytest.raises(ValueError, match=message):
        check_description(older, said_by(replace(MODEL, residual_multiplier=0.5)))


def test_another_model_or_other_data_do_not() -> None:
    wider = said_by(replace(MODEL, hidden_size=256))
    with pytest.raises(ValueError, match=r"model\.hidden_size 128, this run has 256; use the same"):
        check_description(checkpoint_of(said_by(MODEL)), wider)
    with pytest.raises(ValueError, match="was trained on other data"):
        check_description(
            checkpoint_of(said_by(MODEL)), {**said_by(MODEL), "data": {"digest": "e"}}
        )


def test_extras_are_asked_for_only_where_they_are(tmp_path: Path) -> None:
    """A checkpoint without the FP8 scales that Transformer Engine's layers keep."""
    weights = {"layer.weight": torch.ones(2), "layer.here._extra_state": torch.ones(3)}
    path = write_step(tmp_path, 1, weights).path
    asked = {
        "model0": {
            name: ShardedObject(f"layer.{name}", None, (1,), (0,))
            for name in ("weight", "here._extra_state", "absent._extra_state")
        }
    }
    found = without_absent_extras(asked, path)
    assert list(found["model0"]) == ["weight", "here._extra_state"]
    plain = {"model0": {"weight": asked["model0"]["weight"]}}
    assert without_absent_extras(plain, tmp_path / "is not looked at") == plain
