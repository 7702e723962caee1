"""Models with experts: the same numbers on any layout, and those of float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moe_reference import reference_loss
from moe_run import gathered_biases, run_routers
from opened import GLOBAL_BATCH, MASK_ID, SEED, VOCAB_SIZE
from rank_pool import RankPool
from test_invariance import check_equal
from tiny_run import Layout, assemble, layout, model_config, run_layout, token_batch

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.counter_rng import Stream

OBJECTIVES = {
    "autoregressive": ObjectiveConfig(kind="autoregressive"),
    "masked": ObjectiveConfig(kind="masked"),
    "maskgit": ObjectiveConfig(kind="masked", weighting="maskgit"),
    "hybrid": ObjectiveConfig(kind="hybrid", weighting="surrogate", prompt_share=0.5),
}
SMALL = {"num_experts": 4, "ffn_hidden_size": 32, "num_dense_layers": 1}


def with_experts(*, model: dict[str, Any] | None = None, **settings: Any) -> ModelConfig:
    return model_config(moe=MoEConfig(**{**SMALL, **settings}), **(model or {}))


# Only losses that do not depend on the micro-batch.
MODELS = {
    "tokens": with_experts(
        seq_aux_loss_coeff=0.1,
        z_loss_coeff=0.01,
        shared_expert_ffn_hidden_size=16,
        shared_expert_gate=True,
    ),
    "tokens by bias": with_experts(
        score_function="sigmoid", expert_bias=True, router_topk=1, num_dense_layers=0
    ),
    "tokens, gathered": with_experts(seq_aux_loss_coeff=0.1, token_dispatcher="allgather"),
    "experts": with_experts(
        routing="expert_choice", token_balance_loss_coeff=0.1, z_loss_coeff=0.01
    ),
    "experts, scaled": with_experts(
        routing="expert_choice",
        score_function="sigmoid",
        count_scales=[0.5, 1.0, 0.9, 0.8, 0.7],
        token_dispatcher="allgather",
        num_experts=4,
        router_topk=1,
        shared_expert_ffn_hidden_size=16,
    ),
    "experts, full recompute": with_experts(
        routing="expert_choice",
        pre_softmax=True,
        token_balance_loss_coeff=0.1,
        model={"recompute_granularity": "full"},
    ),
}
ONE = layout("one", 1, micro=4)
LAYOUTS = {
    where.name: where
    for where in (
        ONE,
        layout("micro 1", 1, micro=1),
        layout("DP2", 2),
        layout("TP2 + SP", 2, micro=4, tp=2, sp=True),
        layout("EP2", 2, ep=2),
        layout("EP4", 4, ep=4),
        layout("EP2 x DP4", 4, ep=2, micro=1, overlap_grad_reduce=True, overlap_param_gather=True),
        layout("EP2 x TP2 + SP", 4, micro=4, ep=2, tp=2, sp=True),
        layout("EP2 x ETP2 x TP2 + SP", 4, micro=4, ep=2, etp=2, tp=2, sp=True),
        layout("EP2 x PP2", 4, ep=2, pp=2),
        layout("EP2 x PP2 + VPP2", 4, ep=2, pp=2, vpp=2),
        layout("EP2 x CP2", 2, ep=2, cp=2),
        layout("EP2 x CP2 x TP2 + SP", 4, micro=4, ep=2, cp=2, tp=2, sp=True),
    )
}
NUM_STEPS = 3
_references: dict[tuple[str, str], list[dict[str, Any]]] = {}


def run(
    ranks: RankPool,
    where: Layout,
    objective: str,
    model: ModelConfig,
    *,
    num_steps: int = NUM_STEPS,
) -> list[dict[str, Any]]:
    arguments = (where, OBJECTIVES[objective], model, num_steps)
    return ranks.run(run_layout, *arguments, num_ranks=where.num_ranks)


def reference(ranks: RankPool, objective: str, model: str) -> list[dict[str, Any]]:
    key = (objective, model)
    if key not in _references:
        _references[key] = run(ranks, ONE, objective, MODELS[model])
    return _references[key]


@pytest.mark.parametrize(
    ("name", "objective", "model"),
    [
        ("micro 1", "autoregressive", "tokens"),
        ("DP2", "masked", "tokens"),
        ("TP2 + SP", "autoregressive", "tokens"),
        ("EP2", "hybrid", "tokens"),
        ("EP4", "autoregressive", "tokens"),
        ("EP2 x TP2 + SP", "masked", "tokens"),
        ("EP2 x ETP2 x TP2 + SP", "autoregressive", "tokens"),
        ("EP2 x PP2", "hybrid", "tokens"),
        ("EP2 x PP2 + VPP2", "autoregressive", "tokens"),
        ("EP2 x CP2", "autoregressive", "tokens"),
        ("EP2 x CP2 x TP2 + SP", "masked", "tokens"),
        ("EP2 x TP2 + SP", "autoregressive", "tokens by bias"),
        ("EP2 x TP2 + SP", "masked", "tokens, gathered"),
        ("micro 1", "masked", "experts"),
        ("EP2 x DP4", "hybrid", "experts"),
        ("EP2 x TP2 + SP", "masked", "experts"),
        ("EP2 x PP2 + VPP2", "hybrid", "experts"),
        ("EP2 x CP2 x TP2 + SP", "masked", "experts"),
        ("EP2 x ETP2 x TP2 + SP", "masked", "experts, full recompute"),
        ("EP2 x TP2 + SP", "hybrid", "experts, scaled"),
    ],
)
def test_layout(ranks: RankPool, name: str, objective: str, model: str) -> None:
    ours = run(ranks, LAYOUTS[name], objective, MODELS[model])
    check_equal(ours, reference(ranks, objective, model))


def test_documents_on_a_layout(ranks: RankPool) -> None:
    """Rows then travel as one sequence; nothing of a token's choice may depend on that."""
    arguments = (OBJECTIVES["autoregressive"], MODELS["tokens by bias"], NUM_STEPS, True)
    where = LAYOUTS["EP2 x TP2 + SP"]
    ours = ranks.run(run_layout, where, *arguments, num_ranks=where.num_ranks)
    check_equal(ours, ranks.run(run_layout, ONE, *arguments, num_ranks=1))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_both_dispatchers_compute_the_same(ranks: RankPool, dispatcher: str) -> None:
    model = with_experts(seq_aux_loss_coeff=0.1, token_dispatcher=dispatcher)
    ours = run(ranks, LAYOUTS["EP2"], "masked", model)
    check_equal(ours, reference(ranks, "masked", "tokens, gathered"))


EXACT = {
    "aux, z, shared": (
        "autoregressive",
        with_experts(
            aux_loss_coeff=0.5,
            z_loss_coeff=0.05,
            shared_expert_ffn_hidden_size=16,
            shared_expert_gate=True,
        ),
    ),
    "aux and seq, sigmoid": (
        "maskgit",
        with_experts(score_function="sigmoid", aux_loss_coeff=0.3, seq_aux_loss_coeff=0.2),
    ),
    "global": ("masked", with_experts(global_aux_loss_coeff=0.4, num_dense_layers=2)),
    "pre-softmax, dense": (
        "masked",
        with_experts(pre_softmax=True, router_topk=3, num_dense_layers=0),
    ),
    "expert choice": (
        "masked",
        with_experts(routing="expert_choice", token_balance_loss_coeff=0.3, z_loss_coeff=0.05),
    ),
    "expert choice, scaled": (
        "masked",
        with_experts(
            routing="expert_choice",
            score_function="sigmoid",
            count_scales=[0.5, 1.0, 0.9, 0.8, 0.7],
            num_experts=4,
            router_topk=1,
        ),
    ),
    "expert choice, pre-softmax": (
        "maskgit",
        with_experts(routing="expert_choice", pre_softmax=True, token_balance_loss_coeff=0.3),
    ),
    "expert choice of a micro-batch": (
        "masked",
        with_experts(routing="expert_choice", choice_scope="micro_batch", num_dense_layers=3),
    ),
}


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("aux, z, shared", layout("micro 4", 1, micro=4)),
        ("aux, z, shared", layout("micro 1", 1, micro=1)),
        ("aux, z, shared", layout("DP2", 2, micro=2)),
        ("aux, z, shared", layout("TP2 + SP, EP2", 2, micro=4, tp=2, sp=True, ep=2)),
        ("aux and seq, sigmoid", layout("micro 2", 1, micro=2)),
        ("global", layout("micro 2", 1, micro=2)),
        ("global", layout("DP2", 2, micro=2)),
        ("global", layout("DP2 x TP2 + SP", 4, micro=1, tp=2, sp=True)),
        ("pre-softmax, dense", layout("micro 4", 1, micro=4)),
        ("expert choice", layout("micro 2", 1, micro=2)),
        ("expert choice, scaled", layout("micro 4", 1, micro=4)),
        ("expert choice, pre-softmax", layout("DP2", 2, micro=2)),
        ("expert choice of a micro-batch", layout("TP2 + SP", 2, micro=2, tp=2, sp=True)),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else value,
)
def test_gradients_of_float64(ranks: RankPool, what: str, where: Layout) -> None:
    """Main loss and balancing losses at their weights, whatever splits the batch."""
    objective, model = EXACT[what]
    ours = run(ranks, where, objective, model, num_steps=0)
    weights = {
        name: torch.from_numpy(values).double().requires_grad_()
        for name, values in assemble(ours, "initial").items()
    }
    at_a_time = where.micro_batch
    if model.moe.global_aux_loss_coeff:  # the data-parallel ranks pool their counts
        at_a_time *= where.num_ranks // where.parallel.model_parallel_size
    whole_batch_loss(weights, objective, model, micro_batch=at_a_time).backward()
    gradients = assemble(ours, "gradients")
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        wanted = weight.grad.numpy()
        scale = np.abs(wanted).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=2e-5 * scale, err_msg=name)


def whole_batch_loss(
    weights: dict[str, torch.Tensor], objective: str, model: ModelConfig, *, micro_batch: int
) -> torch.Tensor:
    built = build_objective(
        OBJECTIVES[objective],
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK_ID,
        batch_size=GLOBAL_BATCH,
        training=True,
    )
    inputs = [
        built.prepare(
            token_batch(first, micro_batch, model.seq_length, documents=False),
            SEED,
            Stream.TRAINING,
        )
        for first in range(0, GLOBAL_BATCH, micro_batch)
    ]
    return reference_loss(
        weights,
        model,
        [(one.tokens, one.targets, one.weights.double()) for one in inputs],
        causal=objective == "autoregressive",
        num_counted=sum(int(one.counted.sum()) for one in inputs),
    )


def test_expert_bias_moves_once_per_step(ranks: RankPool) -> None:
    """By the demand of the whole global batch: the same on any layout and split."""
    model = with_experts(
        score_function="sigmoid", expert_bias=True, expert_bias_update_rate=0.25, num_dense_layers=3
    )
    arguments = (OBJECTIVES["masked"], model, 2)
    [alone] = ranks.run(run_routers, ONE, *arguments, num_ranks=1)
    before = np.zeros(4, dtype=np.float32)
    for step in range(2):
        bias = gathered_biases([alone], step)[4]
        assert set(np.abs(bias - before).tolist()) <= {0.0, 0.25}
        assert (bias != before).any()
        before = bias
    where = LAYOUTS["EP2 x TP2 + SP"]
    ours = ranks.run(run_routers, where, *arguments, num_ranks=where.num_ranks)
    for step in range(2):
        np.testing.assert_array_equal(
            gathered_biases(ours, step)[4], gathered_biases([alone], step)[4]
        )


def test_expert_bias_stays_fp32_and_sees_demand_before_drops(ranks: RankPool) -> None:
    """Padded to capacity every expert is served alike; the bias must move all the same."""
    model = with_experts(
        score_function="sigmoid",
        expert_bias=True,
        expert_bias_update_rate=1e-3,
        capacity_factor=1.0,
        pad_to_capacity=True,
        num_dense_layers=3,
    )
    arguments = (ONE, OBJECTIVES["masked"], model, 1)
    ours = ranks.run(run_routers_in_bf16, *arguments, num_ranks=1)
    bias = gathered_biases(ours, 0)[4]
    assert set(np.abs(bias).tolist()) <= {0.0, float(np.float32(1e-3))}
    assert bias.any()


STATISTICS = {
    "tokens": with_experts(
        aux_loss_coeff=0.1, seq_aux_loss_coeff=0.1, global_aux_loss_coeff=0.1, z_loss_coeff=0.1
    ),
    "experts": with_experts(routing="expert_choice", token_balance_loss_coeff=0.1, router_topk=1),
}


@pytest.mark.parametrize("name", ["EP2 x TP2 + SP", "EP2 x PP2 + VPP2", "DP2"])
@pytest.mark.parametrize("model", STATISTICS)
def test_statistics_on_a_layout(ranks: RankPool, name: str, model: str) -> None:
    where = LAYOUTS[name]
    config = STATISTICS[model]
    [alone] = ranks.run(run_routers, ONE, OBJECTIVES["masked"], config, 1, num_ranks=1)
    ours = ranks.run(run_routers, where, OBJECTIVES["masked"], config, 1, num_ranks=where.num_ranks)
    # These two are of a micro-batch, and of those so far: they may differ with the split.
    dependent = {"moe_aux_loss", "moe_global_aux_loss"}
    for result in ours:
        for theirs, step in zip(alone["steps"], result["steps"], strict=True):
            assert step.keys() == theirs.keys()
            for key in step.keys() - dependent:
                assert step[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-9), key
            for key in step.keys() & dependent:
                assert step[key] == pytest.approx(theirs[key], rel=0.5), key


def test_recompute_and_validation_do_not_count(ranks: RankPool) -> None:
    plain = STATISTICS["tokens"]
    arguments = (ONE, OBJECTIVES["masked"])
    [wanted] = ranks.run(run_routers, *arguments, plain, 2, num_ranks=1)
    [validated] = ranks.run(run_routers_validated, *arguments, plain, 2, num_ranks=1)
    assert validated["steps"] == wanted["steps"]
    again = with_experts(
        aux_loss_coeff=0.1,
        seq_aux_loss_coeff=0.1,
        global_aux_loss_coeff=0.1,
        z_loss_coeff=0.1,
        model={"recompute_granularity": "full"},
    )
    [recomputed] = ranks.run(run_routers, *arguments, again, 2, num_ranks=1)
    for theirs, ours in zip(wanted["steps"], recomputed["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def run_routers_validated(*arguments: Any) -> dict[str, Any]:
    return run_routers(*arguments, validated=True)


def run_routers_in_bf16(*arguments: Any) -> dict[str, Any]:
    return run_routers(*arguments, precision="bf16")


@pytest.mark.parametrize(
    ("dispatcher", "policy", "pads"),
    [("alltoall", "probs", True), ("alltoall", "position", False), ("allgather", "position", True)],
)
def test_capacity_on_ranks(ranks: RankPool, dispatcher: str, policy: str, pads: bool) -> None:
    """Padding and dispatcher change nothing; the same micro-batches on two ranks neither."""
    settings = {"capacity_factor": 0.75, "drop_policy": policy, "num_dense_layers": 2}
    plain = with_experts(**settings)
    other = with_experts(**settings, pad_to_capacity=pads, token_dispatcher=dispatcher)
    ours = run(ranks, LAYOUTS["EP2"], "masked", other)
    check_equal(ours, run(ranks, layout("micro 2", 1, micro=2), "masked", plain))


def test_capacity_drops_what_it_says(ranks: RankPool) -> None:
    """Half of the fair share: at least half of all pairs are dropped, and padding hides none."""
    shares = []
    for pad in (False, True):
        model = with_experts(capacity_factor=0.5, pad_to_capacity=pad, num_dense_layers=3)
        arguments = (OBJECTIVES["masked"], model, 1)
        where = LAYOUTS["EP2"]
        ours = ranks.run(run_routers, where, *arguments, num_ranks=where.num_ranks)
        [step] = ours[0]["steps"]
        shares.append(step["moe_dropped_share"])
        served = step["moe_experts_per_token"]
        assert served == pytest.approx(2 * (1 - step["moe_dropped_share"]))
    assert shares[0] == shares[1]
    assert 0.5 <= shares[0] < 1.0
