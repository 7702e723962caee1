"""What the model section refuses by itself."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig, weight_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qk_layernorm": False, "qk_layernorm_scope": "full"},
            "model.qk_layernorm_scope full has no meaning with model.qk_layernorm false; remove it",
        ),
        (
            {"attn_logit_softcapping": 0.0},
            "model.attn_logit_softcapping is 0.0; it must be positive",
        ),
        ({"residual_multiplier": 0.0}, "model.residual_multiplier is 0.0"),
        ({"output_multiplier": -1.0}, "model.output_multiplier is -1.0"),
        (
            {"output_init_std": -0.1, "untie_embeddings_and_output_weights": True},
            "model.output_init_std is -0.1; it must be at least 0",
        ),
        (
            {"output_init_std": 0.0},
            "model.output_init_std is 0.0, but the output layer is the embedding; set "
            "model.untie_embeddings_and_output_weights true",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        ModelConfig(**changes)
    assert "\n" not in str(caught.value)


def test_options_that_change_no_weight_can_change_between_runs() -> None:
    names = {field.name for field in fields(ModelConfig)} - {"moe"}
    assert names - weight_settings(ModelConfig()).keys() == {
        "seq_length",
        "attention_backend",
        "recompute_modules",
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "output_init_std",
        "transformer_impl",
        "recompute_granularity",
        "recompute_num_layers",
        "megatron",
    }
