"""The distribution of the initial weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from opened import opened_model
from rank_pool import RankPool
from tiny_run import Layout, assemble, layout, model_config, own_shards, run_layout

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig

STD = 0.02
MODEL = model_config(hidden_size=64, init_method_std=STD, untie_embeddings_and_output_weights=True)


def test_standard_deviations(ranks: RankPool) -> None:
    result = ranks.run(run_layout, layout("one", 1), ObjectiveConfig(), MODEL, 0, num_ranks=1)
    weights = assemble(result, "initial")
    residual = STD / math.sqrt(2 * MODEL.num_layers)
    seen = set()
    for name, values in weights.items():
        if "norm" in name:
            np.testing.assert_array_equal(values, 1.0, err_msg=name)
            continue
        is_residual = "linear_proj" in name or "linear_fc2" in name
        expected = residual if is_residual else STD
        # The relative standard error of a deviation from n draws is 1 / sqrt(2n).
        error = 5 / math.sqrt(2 * values.size)
        assert abs(values.std() / expected - 1) < error, name
        assert abs(values.mean()) < 5 * expected / math.sqrt(values.size), name
        seen.add(is_residual)
    assert seen == {True, False}
    flat = np.concatenate(
        [values.ravel() for name, values in weights.items() if "norm" not in name]
    )
    assert len(np.unique(flat)) > 0.95 * len(flat), "parameters or layers repeat their values"


COMPLETEP_MODEL = model_config(
    hidden_size=64,
    init_method_std=STD,
    activation="squared_relu",
    mlp_bias=True,
    attention_sink=True,
    layernorm_zero_centered_gamma=True,
    untie_embeddings_and_output_weights=True,
    output_init_std=0.0,
)


def completep_weights(where: Layout) -> dict[str, Any]:
    """This rank's shards of a model that starts as CompleteP says."""

    optimizer = OptimizerConfig(parametrization="completep", bulk_init_scale=0.8)
    with opened_model(where.parallel, COMPLETEP_MODEL, seed=5, optimizer=optimizer) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        return {"initial": own_shards(chunks, parallel, gradients=False)}


def test_completep(ranks: RankPool) -> None:
    """Matrices of all layers, also residual outputs, 0.8 / sqrt(64); the rest 0 but the table."""
    weights = assemble(ranks.run(completep_weights, layout("one", 1), num_ranks=1), "initial")
    for name, values in weights.items():
        is_matrix = name.endswith(("_qkv.weight", "_proj.weight", "_fc1.weight", "_fc2.weight"))
        expected = 0.1 if is_matrix else STD if name.startswith("embedding") else 0.0
        tolerance = 5 / math.sqrt(2 * values.size)
        assert values.std() == pytest.approx(expected, rel=tolerance, abs=0), name
        assert abs(values.mean()) <= 5 * expected / math.sqrt(values.size), name
    assert {"output_layer.weight", "decoder.layers.mlp.linear_fc1.bias"} <= weights.keys()
    where = layout("TP2 x PP2", 4, tp=2, pp=2)
    split = assemble(ranks.run(completep_weights, where, num_ranks=4), "initial")
    assert split.keys() == weights.keys()
    for name, values in split.items():
        np.testing.assert_array_equal(values, weights[name], err_msg=name)
