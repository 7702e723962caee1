"""Router metrics against counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.moe_statistics import RouterStatistics, collect, metric_names


def model_with(**settings: Any) -> ModelConfig:
    return ModelConfig(moe=MoEConfig(num_experts=4, **settings))


def test_names() -> None:
    assert metric_names(ModelConfig()) == ()
    always = (
        "moe_load_max_over_mean",
        "moe_load_min_over_mean",
        "moe_entropy",
        "moe_experts_per_token",
        "moe_experts_per_token_std",
        "moe_dropped_share",
    )
    assert metric_names(model_with()) == always
    losses = metric_names(model_with(seq_aux_loss_coeff=0.1, z_loss_coeff=0.1))[len(always) :]
    assert losses == ("moe_seq_aux_loss", "moe_z_loss")


class Layer(nn.Module):
    def __init__(self, moe: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.statistics = RouterStatistics(moe)


def reported(moe: MoEConfig, loss: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """In a rank: two layers, the second silent in its losses; then a call with nothing new."""
    from megatron_dlm.runtime.parallel import laid_out

    layers = nn.ModuleList([Layer(moe), Layer(moe)])
    even, certain = torch.zeros(3, 4), torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    served = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    logits = torch.cat([even, certain])
    with laid_out(ParallelConfig()) as parallel:
        for layer in layers:
            for part in (slice(0, 1), slice(1, 4)):
                layer.statistics.add(logits[part], wanted[part], served[part])
        layers[0].statistics.add_loss(loss, torch.tensor(1.5), 1.0)
        layers[0].statistics.add_loss(loss, torch.tensor(2.5), 1.0)
        first = collect([layers], parallel)
        second = collect([layers], parallel)
        return tuple(  # type: ignore[return-value]
            {name: (float(total), float(count)) for name, (total, count) in terms.items()}
            for terms in (first, second)
        )


BY_TOKENS = MoEConfig(num_experts=4, aux_loss_coeff=0.1, z_loss_coeff=0.1)
BY_EXPERTS = MoEConfig(
    num_experts=4, routing="expert_choice", token_balance_loss_coeff=0.1, z_loss_coeff=0.1
)


@pytest.mark.parametrize(
    ("moe", "loss", "dropped"),
    [(BY_TOKENS, "moe_aux_loss", 3 / 8), (BY_EXPERTS, "moe_token_balance_loss", 1 / 4)],
    ids=["token choice", "expert choice"],
)
def test_by_hand(ranks: RankPool, moe: MoEConfig, loss: str, dropped: float) -> None:
    [(first, second)] = ranks.run(reported, moe, loss, num_ranks=1)
    wanted = {
        "moe_load_max_over_mean": 4 / 2,  # loads 4, 3, 1, 0
        "moe_load_min_over_mean": 0.0,
        "moe_entropy": 3 / 4,  # three undecided tokens of four, in units of ln 4
        "moe_experts_per_token": 5 / 4,
        "moe_experts_per_token_std": math.sqrt(9 / 4 - 25 / 16),
        "moe_dropped_share": dropped,
    }
    assert first.keys() == set(metric_names(ModelConfig(moe=moe))) == second.keys()
    for name, value in wanted.items():
        total, count = first[name]
        assert count == 2, name
        assert total / count == pytest.approx(value), name
    assert first[loss] == (2.0, 1.0)  # the mean of its two micro-batches, in one layer
    assert first["moe_z_loss"] == (0.0, 0.0)
    assert all(term == (0.0, 0.0) for term in second.values())
