"""Which share of the slots counts: what balancing losses are scaled by."""

from __future__ import annotations

import pytest
from opened import SEED, opened_model
from rank_pool import RankPool
from tiny_run import layout, micro_batches, model_config

from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.ops.counter_rng import Stream


def share_of(objective: ObjectiveConfig, num_ranks: int) -> set[float]:
    """Of every router of this rank, in a global batch of 8 times 16 tokens, 3 of them not valid."""
    from megatron_dlm.models.moe_routers import routers_of
    from megatron_dlm.training.balancing import weigh_balancing_losses

    where = layout("any", num_ranks)
    model = model_config(moe=MoEConfig(num_experts=2, ffn_hidden_size=16, num_dense_layers=2))
    with opened_model(where.parallel, model, objective) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        built = opened.built_objective()
        batches = micro_batches(where, parallel, 0, model.seq_length, documents=False)
        weigh_balancing_losses(
            chunks, batches, built, seed=SEED, stream=Stream.TRAINING, parallel=parallel
        )
        assert len(routers_of(chunks)) == 2
        return {float(router.balancing_scale) for router in routers_of(chunks)}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_share_of_counted_slots(ranks: RankPool, num_ranks: int) -> None:
    shares = {
        "autoregressive": 126 / 128,  # the first of the three is no target
        "masked": 125 / 128,
        "block": 125 / 256,  # noisy and clean slots
    }
    for kind, share in shares.items():
        objective = ObjectiveConfig(kind=kind)
        found = ranks.run(share_of, objective, num_ranks, num_ranks=num_ranks)
        assert found == [{share}] * num_ranks, kind
