"""Dropout masks: shared where activations are replicated, different where they are split."""

from __future__ import annotations

import pytest
import torch
from rank_pool import RankPool

from megatron_dlm.config.parallel import ParallelConfig


def draw_masks(
    parallel_config: ParallelConfig, steps: tuple[int, ...]
) -> list[dict[str, list[float]]]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout

    drawn = []
    with laid_out(parallel_config) as parallel:
        for step in steps:
            seed_dropout(5, step, parallel)
            replicated = torch.rand(8).tolist()
            with get_cuda_rng_tracker().fork():
                split = torch.rand(8).tolist()
            after = torch.rand(8).tolist()
            drawn.append({"replicated": replicated, "split": split, "after": after})
    return drawn


def test_tensor_parallel_ranks(ranks: RankPool) -> None:
    config = ParallelConfig(tensor_model_parallel_size=2)
    one, two = (result[0] for result in ranks.run(draw_masks, config, (0,), num_ranks=2))
    assert one["replicated"] == two["replicated"]
    assert one["after"] == two["after"]
    assert one["split"] != two["split"]


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(),
        ParallelConfig(pipeline_model_parallel_size=2),
        ParallelConfig(context_parallel_size=2),
    ],
    ids=["DP2", "PP2", "CP2"],
)
def test_other_ranks_differ(ranks: RankPool, config: ParallelConfig) -> None:
    one, two = (result[0] for result in ranks.run(draw_masks, config, (0,), num_ranks=2))
    assert one["replicated"] != two["replicated"]
    assert one["split"] != two["split"]


def test_pure_function_of_the_step(ranks: RankPool) -> None:
    first, second, again = ranks.run(draw_masks, ParallelConfig(), (3, 4, 3), num_ranks=1)[0]
    assert first == again
    assert first["replicated"] != second["replicated"]
