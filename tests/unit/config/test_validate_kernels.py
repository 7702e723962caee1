"""Kernels, FP8 shapes and offload that no machine could run, refused before anything starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate_kernels import check_kernels


def config(**sections: dict[str, Any]) -> RunConfig:
    run = RunConfig()
    return dataclasses.replace(
        run,
        **{
            name: dataclasses.replace(getattr(run, name), **values)
            for name, values in sections.items()
        },
    )


FP8 = {"precision": "fp8"}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

ALLOWED: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "fp8": {"train": FP8},
    "fp8, TP2 + SP": {"train": FP8, "parallel": TP2_SP},
    "fp8, mxfp8": {"train": FP8, "fp8": {"recipe": "mxfp8"}},
    "fused attention": {"model": {"attention_backend": "fused"}},
    "own attention with a cap": {
        "model": {"attention_backend": "local", "attn_logit_softcapping": 30.0}
    },
    "offload": {
        "parallel": {"optimizer_cpu_offload_fraction": 0.5, "activation_offload_layers": 3}
    },
}

REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "cap": (
        {"model": {"attention_backend": "fused", "attn_logit_softcapping": 30.0}},
        "model.attention_backend fused cannot compute model.attn_logit_softcapping; use auto",
    ),
    "blocks": (
        {"model": {"attention_backend": "flash"}, "objective": {"kind": "block"}},
        "model.attention_backend flash cannot compute the attention of objective.kind block; use "
        "auto",
    ),
    "no layer left": (
        {"parallel": {"activation_offload_layers": 4}},
        "parallel.activation_offload_layers 4 must be below model.num_layers 4: the last layer is "
        "needed at once",
    ),
    "offload and recompute": (
        {
            "parallel": {"activation_offload_layers": 2},
            "model": {"recompute_granularity": "full"},
        },
        "parallel.activation_offload_layers 2 and model.recompute_granularity full both save "
        "activations; use one of them",
    ),
    "offloaded LaProp": (
        {"parallel": {"optimizer_cpu_offload_fraction": 0.5}, "optimizer": {"kind": "laprop"}},
        "parallel.optimizer_cpu_offload_fraction 0.5 needs optimizer.kind adamw; it is laprop",
    ),
    "offload on the CPU": (
        {"parallel": {"optimizer_cpu_offload_fraction": 0.5}, "train": {"device": "cpu"}},
        "parallel.optimizer_cpu_offload_fraction is 0.5, but train.device is cpu: the optimizer is "
        "there already",
    ),
    "overlap with lengths": (
        {
            "parallel": {**TP2_SP, "tp_comm_overlap": True},
            "objective": {"variable_length_probability": 0.5},
        },
        "parallel.tp_comm_overlap has buffers of one shape and of bf16, which "
        "objective.variable_length_probability does not keep to; use one of them",
    ),
    "fp8 on the CPU": (
        {"train": {**FP8, "device": "cpu"}},
        "train.precision fp8 needs Transformer Engine on a GPU, but model.transformer_impl is auto "
        "and train.device is cpu; use bf16, or auto for both",
    ),
    "fp8 width": (
        {"train": FP8, "model": {"hidden_size": 120}},
        "fp8.recipe tensorwise multiplies matrices whose sides are multiples of 16; "
        "model.hidden_size is 120",
    ),
    "fp8 tokens": (
        {"train": FP8, "model": {"seq_length": 24}},
        "fp8.recipe tensorwise multiplies matrices whose sides are multiples of 16; tokens of one "
        "pass (micro_batch_size * sequence / CP, / TP with SP) is 24",
    ),
    "mxfp8 tokens": (
        {"train": FP8, "fp8": {"recipe": "mxfp8"}, "model": {"seq_length": 48}},
        "fp8.recipe mxfp8 multiplies matrices whose sides are multiples of 32; tokens of one pass "
        "(micro_batch_size * sequence / CP, / TP with SP) is 48",
    ),
    "fp8 recompute": (
        {
            "train": FP8,
            "fp8": {"recipe": "delayed"},
            "model": {
                "recompute_granularity": "selective",
                "recompute_modules": ["mlp", "layernorm"],
            },
        },
        "fp8.recipe delayed cannot recompute layernorm (model.recompute_modules); use recipe "
        "tensorwise",
    ),
    "fp8 experts": (
        {"train": FP8, "model": {"moe": {"num_experts": 4, "ffn_hidden_size": 40}}},
        "fp8.recipe tensorwise multiplies matrices whose sides are multiples of 16; "
        "model.moe.ffn_hidden_size / ETP is 40",
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    check_kernels(config(**ALLOWED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    sections, message = REFUSED[name]
    moe = sections.get("model", {}).get("moe")
    if isinstance(moe, dict):
        changed = dataclasses.replace(RunConfig().model.moe, **moe)
        sections = {**sections, "model": {**sections["model"], "moe": changed}}
    with pytest.raises(ValueError, match=r".") as caught:
        check_kernels(config(**sections))
    assert str(caught.value) == message


def test_parallel_options_that_need_each_other() -> None:
    cases = {
        "parallel.tp_comm_overlap needs parallel.sequence_parallel": {"tp_comm_overlap": True},
        "parallel.activation_offload_layers 2 needs parallel.pipeline_model_parallel_size 1": {
            "activation_offload_layers": 2,
            "pipeline_model_parallel_size": 2,
        },
        "parallel.bucket_size_parameters is 0; it must be greater than 0": {
            "bucket_size_parameters": 0
        },
        "parallel.bucket_size_parameters is 9, but gradients travel in buckets only with "
        "parallel.overlap_grad_reduce": {"bucket_size_parameters": 9},
        "parallel.optimizer_cpu_offload_fraction is 1.5; it must lie in [0, 1]": {
            "optimizer_cpu_offload_fraction": 1.5
        },
    }
    for message, values in cases.items():
        with pytest.raises(ValueError, match=r"^parallel") as caught:
            config(parallel=values)
        assert str(caught.value) == message
