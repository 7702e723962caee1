"""The optimizer in Megatron Core's words."""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.training.optimizer import megatron_settings

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
BF16 = TransformerConfig(**MODEL, bf16=True, params_dtype=torch.bfloat16)


def test_settings_reach_megatron() -> None:
    config = OptimizerConfig(lr=0.5, adam_beta1=0.8, adam_beta2=0.9, clip_grad=0.0)
    found = megatron_settings(config, BF16, overlap_param_gather=True, offload_fraction=0.0)
    assert (found.lr, found.adam_beta1, found.adam_beta2) == (0.5, 0.8, 0.9)
    assert (found.bf16, found.params_dtype) == (True, torch.bfloat16)
    assert math.isfinite(found.clip_grad)
    assert found.clip_grad > 1e300
    assert found.overlap_param_gather
    assert not found.optimizer_cpu_offload
    assert not found.use_precision_aware_optimizer
    assert found.fp8_recipe is None  # Megatron Core's own default of a bf16 model names one


def test_fp8_recipe_is_known_to_the_optimizer() -> None:
    model = TransformerConfig(**MODEL, bf16=True, fp8="hybrid", fp8_recipe="tensorwise")
    found = megatron_settings(
        OptimizerConfig(), model, overlap_param_gather=False, offload_fraction=0.0
    )
    assert found.fp8_recipe == "tensorwise"
