"""Steps of a tiny model with experts: what its routers report; runs inside the ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from opened import opened_model
from tiny_run import Layout, micro_batches

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import OptimizerConfig
from megatron_dlm.ops.counter_rng import Stream


def run_routers(
    where: Layout,
    objective: ObjectiveConfig,
    model: ModelConfig,
    num_steps: int,
    *,
    validated: bool = False,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Router metrics of every step, and the expert biases after it, by number of the layer."""
    from megatron_dlm.models.moe_routers import routers_of
    from megatron_dlm.models.moe_statistics import metric_names
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import train_step
    from megatron_dlm.training.validate import validate

    with opened_model(where.parallel, model, objective, precision=precision) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(lr=1e-3), overlap_param_gather=False)
        names = metric_names(model)
        setup = opened.pass_of(wrapped)
        steps, biases = [], []
        for step in range(num_steps):
            batches = micro_batches(where, parallel, step, model.seq_length, documents=False)
            if validated:
                validate(dataclasses.replace(setup, stream=Stream.VALIDATION), batches)
            train_step(setup, optimizer, batches)
            report = setup.metrics.reduce()
            steps.append({name: value for name, value in report.items() if name in names})
            routers = routers_of(wrapped)
            biases.append(
                {
                    router.layer_number: (
                        router.expert_bias.dtype,
                        router.expert_bias.numpy().copy(),
                    )
                    for router in routers
                    if getattr(router, "expert_bias", None) is not None
                }
            )
    return {"steps": steps, "biases": biases}


def gathered_biases(results: list[dict[str, Any]], step: int) -> dict[int, np.ndarray]:
    """Layer -> its bias after a step, which must be fp32 and the same on all ranks that hold it."""
    found: dict[int, np.ndarray] = {}
    for result in results:
        for layer, (dtype, bias) in result["biases"][step].items():
            assert dtype is torch.float32
            np.testing.assert_array_equal(found.setdefault(layer, bias), bias)
    return found
