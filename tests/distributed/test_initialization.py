"""The distribution of the initial weights."""

from __future__ import annotations

import math

import numpy as np
from rank_pool import RankPool
from tiny_run import assemble, layout, model_config, run_layout

from megatron_dlm.config.objective import ObjectiveConfig

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
