"""Which runs may go on from a checkpoint, by what it says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.checkpoint.store import check_description
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
