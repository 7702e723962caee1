"""Every rule of experts: one configuration that passes, one change that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_dlm.config.validate import check

EXPERT_CHOICE = {"routing": "expert_choice"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aux_loss_coeff": 0.1, "seq_aux_loss_coeff": 0.1, "global_aux_loss_coeff": 0.1},
        {"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.01},
        {"capacity_factor": 2.0, "pad_to_capacity": True, "drop_policy": "position"},
        {"router_topk": 1, "pre_softmax": True},
        {"router_topk": 1, "score_function": "sigmoid"},
        {**EXPERT_CHOICE, "router_topk": 1},
        {**EXPERT_CHOICE, "count_scales": [0.0, 1.0, 1.0, 0.5, 0.25], "z_loss_coeff": 0.1},
        {**EXPERT_CHOICE, "choice_scope": "micro_batch", "token_balance_loss_coeff": 0.1},
    ],
)
def test_good_settings(settings: dict[str, Any]) -> None:
    MoEConfig(num_experts=4, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**EXPERT_CHOICE, "aux_loss_coeff": 0.1}, "aux_loss_coeff is 0.1, but .*expert_choice"),
        ({**EXPERT_CHOICE, "seq_aux_loss_coeff": 0.1}, "has no use for it; remove it"),
        ({**EXPERT_CHOICE, "global_aux_loss_coeff": 0.1}, "has no use for it; remove it"),
        ({**EXPERT_CHOICE, "expert_bias": True}, "expert_bias is True, but"),
        ({**EXPERT_CHOICE, "capacity_factor": 1.0}, "capacity_factor is 1.0, but"),
        ({"choice_scope": "micro_batch"}, "choice_scope is micro_batch, but .*token_choice"),
        ({"token_balance_loss_coeff": 0.1}, "token_balance_loss_coeff is 0.1, but"),
        ({"count_scales": [1.0] * 5}, "has no use for it; remove it"),
        ({"drop_policy": "position"}, "it needs model.moe.capacity_factor"),
        ({"pad_to_capacity": True}, "it needs model.moe.capacity_factor"),
        ({"expert_bias_update_rate": 0.1}, "it needs model.moe.expert_bias"),
        ({"expert_bias": True}, "needs model.moe.score_function sigmoid"),
        ({"score_function": "sigmoid", "pre_softmax": True}, "pre_softmax has no meaning"),
        ({"router_topk": 1}, "always 1, and the router would never learn"),
        ({"capacity_factor": 0.0}, r"capacity_factor is 0.0; it must lie in \(0, 2\]"),
        ({"capacity_factor": 2.5}, r"capacity_factor is 2.5; it must lie in \(0, 2\]"),
        ({**EXPERT_CHOICE, "count_scales": [1.0] * 4}, "has 4 numbers; give num_experts . 1 = 5"),
        ({**EXPERT_CHOICE, "count_scales": [1.0] * 4 + [-1.0]}, "has -1.0; its numbers must"),
        ({"router_topk": 5}, "it must be between 1 and model.moe.num_experts 4"),
        ({"shared_expert_gate": True}, "needs model.moe.shared_expert_ffn_hidden_size"),
        ({"num_experts": 0, "router_topk": 3}, r"router_topk is 3, but model.moe.num_experts is 0"),
        ({"num_experts": 0, "count_scales": [1.0]}, r"count_scales is \[1.0\], but"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MoEConfig(**{"num_experts": 4, **settings})
    assert "\n" not in str(caught.value)


GOOD = RunConfig(
    model=ModelConfig(
        vocab_size=1000,
        num_layers=4,
        num_query_groups=2,
        moe=MoEConfig(num_experts=8, ffn_hidden_size=64, shared_expert_ffn_hidden_size=32),
    ),
    objective=ObjectiveConfig(mask_token_id=3),
    data=DataConfig(train={"shard": 1.0}),
    train=TrainConfig(steps=10, global_batch_size=16),
)
CHOOSING = replace(GOOD.model, moe=MoEConfig(num_experts=8, ffn_hidden_size=64, **EXPERT_CHOICE))


def changed(config: RunConfig = GOOD, **sections: dict[str, Any]) -> RunConfig:
    parts = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **parts)


EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (GOOD, 1),
        (changed(parallel=EP2), 2),
        (changed(parallel={**EP2, **TP2, "pipeline_model_parallel_size": 2}), 8),
        (changed(parallel={**EP2, **TP2, "expert_tensor_parallel_size": 2}), 4),
        (replace(GOOD, model=CHOOSING), 1),
        (replace(GOOD, objective=ObjectiveConfig(kind="autoregressive")), 1),
    ],
)
def test_good_runs(config: RunConfig, world_size: int) -> None:
    check(config, world_size)


DENSE = changed(model={"moe": MoEConfig()})


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            changed(parallel={"expert_model_parallel_size": 16}),
            16,
            "model.moe.num_experts 8 is not a multiple of parallel.expert_model_parallel_size 16",
        ),
        (
            changed(
                parallel={"expert_tensor_parallel_size": 8},
                model={"moe": replace(GOOD.model.moe, ffn_hidden_size=60)},
            ),
            8,
            "ffn_hidden_size 60 is not a multiple of parallel.expert_tensor_parallel_size 8",
        ),
        (
            changed(
                parallel=TP2,
                model={"moe": replace(GOOD.model.moe, shared_expert_ffn_hidden_size=33)},
            ),
            2,
            "shared_expert_ffn_hidden_size 33 is not a multiple of parallel.tensor_model_parallel",
        ),
        (changed(DENSE, parallel=EP2), 2, "but the model has no experts"),
        (
            changed(DENSE, parallel={"expert_tensor_parallel_size": 2}),
            2,
            "expert_tensor_parallel_size is 2, but the model has no experts",
        ),
        (
            changed(parallel={"tensor_model_parallel_size": 2}),
            2,
            "set parallel.sequence_parallel true",
        ),
        (changed(parallel={"expert_model_parallel_size": 4}), 2, "2 ranks are not a multiple of 4"),
        (changed(model={"mlp_bias": True}), 1, "experts have no biases"),
        (
            replace(GOOD, model=CHOOSING, objective=ObjectiveConfig(kind="autoregressive")),
            1,
            "expert_choice cannot train objective.kind autoregressive",
        ),
        (
            replace(GOOD, model=CHOOSING, objective=ObjectiveConfig(kind="block", mask_token_id=3)),
            1,
            "expert_choice cannot train objective.kind block",
        ),
        (
            changed(replace(GOOD, model=CHOOSING), data={"reset_attention_mask": True}),
            1,
            "lets the documents of a window compete for experts",
        ),
        (
            changed(
                data={"reset_attention_mask": True},
                model={"moe": replace(GOOD.model.moe, seq_aux_loss_coeff=0.1)},
            ),
            1,
            "the rows of a micro-batch are one sequence; use aux_loss_coeff",
        ),
        (
            replace(GOOD, model=replace(CHOOSING, megatron={"moe_router_num_groups": 2})),
            1,
            "model.megatron.moe_router_num_groups has no effect",
        ),
        (
            replace(GOOD, model=replace(CHOOSING, megatron={"moe_input_jitter_eps": 0.1})),
            1,
            "model.megatron.moe_input_jitter_eps has no effect .* expert_choice; remove it",
        ),
        (
            changed(model={"megatron": {"moe_enable_routing_replay": True}}),
            1,
            "moe_enable_routing_replay has no effect with model.moe.routing token_choice",
        ),
    ],
)
def test_bad_runs(config: RunConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(config, world_size)
    assert "\n" not in str(caught.value)
