"""Every parameter moves by its own rate and decay, whatever the optimizer and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opened import opened_model
from rank_pool import RankPool
from resume_run import checkpoint_tensors, train_in_ranks, write_shards
from tiny_run import Layout, layout, model_config

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.optimizer import OptimizerConfig

LR, DECAY = 0.3, 0.25
MODEL = model_config(
    activation="squared_relu",
    mlp_bias=True,
    attention_sink=True,
    qk_layernorm_scope="full",
    untie_embeddings_and_output_weights=True,
)
# hidden_size 32, 4 layers: lr / 32, decay * 32, 1e-8 / 128.
EPSILON = {"standard": 1e-8, "completep": 7.8125e-11}
EXPERTS = model_config(
    activation="squared_relu",
    untie_embeddings_and_output_weights=True,
    moe=MoEConfig(num_experts=4, shared_expert_ffn_hidden_size=32, shared_expert_gate=True),
)
LAYOUTS = [layout("one rank", 1), layout("DP2", 2), layout("TP2 x PP2", 4, tp=2, pp=2)]


def one_update(
    where: Layout, optimizer_config: OptimizerConfig, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """Settings of the groups, and every parameter before and after an update with gradient 1."""
    from megatron_dlm.training.optimizer import (
        build_optimizer,
        set_learning_rate,
        wrap_data_parallel,
    )

    with opened_model(where.parallel, model, seed=1) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        optimizer = build_optimizer(wrapped, optimizer_config, overlap_param_gather=False)
        set_learning_rate(optimizer, LR)
        named = {name: value for chunk in chunks for name, value in chunk.named_parameters()}
        before = {name: value.detach().numpy().copy() for name, value in named.items()}
        for value in named.values():
            value.main_grad.fill_(1.0)
        optimizer.step()
        after = {name: value.detach().numpy().copy() for name, value in named.items()}
        groups = [
            {key: group[key] for key in ("lr", "weight_decay", "eps", "betas")}
            for group in optimizer.param_groups
        ]
    return {"before": before, "after": after, "groups": groups}


def wanted(name: str, parametrization: str) -> tuple[float, float]:
    """(learning rate, weight decay), from the table of the paper."""
    is_gain_or_bias = "norm" in name or "bias" in name or "sink" in name
    if parametrization == "standard":
        return LR, 0.0 if is_gain_or_bias else DECAY
    is_gate = "router" in name or "gate_weight" in name
    if is_gain_or_bias or is_gate or "embedding" in name or "output_layer" in name:
        return 0.02 * LR, 0.0
    return LR / 32, DECAY * 32


@pytest.mark.parametrize("where", LAYOUTS, ids=lambda where: where.name)
@pytest.mark.parametrize("parametrization", ["standard", "completep"])
@pytest.mark.parametrize("kind", ["adamw", "laprop"])
def test_one_update(ranks: RankPool, kind: str, parametrization: str, where: Layout) -> None:
    """With a gradient of 1 the first update is lr * (1 + decay * weight) for both optimizers."""
    config = OptimizerConfig(
        kind=kind, lr=LR, weight_decay=DECAY, clip_grad=0.0, parametrization=parametrization
    )
    results = ranks.run(one_update, where, config, num_ranks=where.num_ranks)
    seen = check_updates(results, parametrization)
    assert {"mlp.linear_fc1.bias", "mlp.linear_fc2.bias", "output_layer.weight"} <= seen
    assert {f"self_attention.core_attention.sink_{what}" for what in ("key", "value")} <= seen
    assert len(seen) == 15, seen


@pytest.mark.parametrize("parametrization", ["standard", "completep"])
@pytest.mark.parametrize("kind", ["adamw", "laprop"])
def test_one_update_of_experts(ranks: RankPool, kind: str, parametrization: str) -> None:
    """Under EP they have an optimizer of their own, which gets the same groups."""
    config = OptimizerConfig(
        kind=kind, lr=LR, weight_decay=DECAY, clip_grad=0.0, parametrization=parametrization
    )
    where = layout("EP2", 2, ep=2)
    seen = check_updates(
        ranks.run(one_update, where, config, EXPERTS, num_ranks=2), parametrization
    )
    assert {f"mlp.experts.local_experts.{n}.linear_fc1.weight" for n in (0, 1)} <= seen
    assert {"mlp.router.weight", "mlp.shared_experts.gate_weight"} <= seen


def check_updates(results: list[dict[str, Any]], parametrization: str) -> set[str]:
    """Every parameter moved as it should; returns their names inside a layer."""
    seen = set()
    for result in results:
        for name, before in result["before"].items():
            lr, decay = wanted(name, parametrization)
            expected = before - lr * (1 + decay * before)
            np.testing.assert_allclose(result["after"][name], expected, atol=2e-7, err_msg=name)
            seen.add(name.rsplit("layers.", 1)[-1].lstrip("0123456789."))
        groups = {(group["lr"], group["weight_decay"]) for group in result["groups"]}
        assert groups == {wanted(name, parametrization) for name in ("weight", "bias")}
        for group in result["groups"]:
            assert group["eps"] == pytest.approx(EPSILON[parametrization])
            assert tuple(group["betas"]) == (0.9, 0.95)
    return seen


RUN = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "train": {"steps": 4, "global_batch_size": 8, "precision": "fp32"},
    "logging": {"tensorboard": False},
}


def test_beta2_of_the_batch_size(ranks: RankPool, tmp_path: Path) -> None:
    """A whole run of 8 samples per step trains with the beta2 given for 8 samples."""
    shards = write_shards(tmp_path)
    optimizer = {"kind": "laprop", "lr": 1e-2, "adam_beta2": 0.99}
    weights = []
    for number, flag in enumerate(
        (
            "--optimizer.adam_beta2_by_batch={8: 0.5, 9: 0.9}",
            "--optimizer.adam_beta2=0.5",
            "--optimizer.adam_beta2_by_batch={9: 0.5}",
        )
    ):
        run = tmp_path / f"run{number}"
        base = {**RUN, "optimizer": optimizer}
        ranks.run(train_in_ranks, base, shards, run, [flag], num_ranks=1)
        path = run / "checkpoints" / "iter_0000004"
        [tensors] = ranks.run(checkpoint_tensors, str(path), num_ranks=1)
        weights.append(tensors["decoder.layers.mlp.linear_fc2.weight"])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[2] - weights[1]).max() > 1e-4


def test_a_run_starts_as_completep_says(ranks: RankPool, tmp_path: Path) -> None:
    flags = [
        "--optimizer.parametrization=completep",
        "--optimizer.lr=1e-30",
        "--model.untie_embeddings_and_output_weights=true",
        "--model.residual_multiplier=2",
        "--model.output_multiplier=16",
    ]
    run = tmp_path / "run"
    ranks.run(train_in_ranks, RUN, write_shards(tmp_path), run, flags, num_ranks=1)
    path = run / "checkpoints" / "iter_0000004"
    [tensors] = ranks.run(checkpoint_tensors, str(path), num_ranks=1)
    for name in ("self_attention.linear_qkv", "mlp.linear_fc2"):
        std = tensors[f"decoder.layers.{name}.weight"].std()
        assert std == pytest.approx(0.4 / 32**0.5, rel=0.05), name
