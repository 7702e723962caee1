"""Promise 1: the same numbers on any layout, for every objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool
from tiny_run import LAYOUTS, Layout, assemble, layout, model_config, run_layout

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig

OBJECTIVES = {
    "autoregressive": ObjectiveConfig(kind="autoregressive"),
    "input masking": ObjectiveConfig(kind="autoregressive", input_masking_ratio=0.3),
    "elbo": ObjectiveConfig(kind="masked"),
    "count": ObjectiveConfig(kind="masked", weighting="count"),
    "maskgit": ObjectiveConfig(kind="masked", weighting="maskgit", schedule="cosine"),
    "curricula": ObjectiveConfig(
        kind="masked", time_curriculum_steps=2, attention_annealing_steps=2
    ),
    "hybrid": ObjectiveConfig(
        kind="hybrid",
        weighting="surrogate",
        independent_noise_share=0.4,
        prompt_share=0.4,
        infilling_share=0.3,
        empty_token_share=0.3,
        pad_token_id=5,
    ),
    "uniform": ObjectiveConfig(kind="hybrid", noise_type="uniform"),
    "only masks": ObjectiveConfig(kind="hybrid", noise_type="masked"),
    "dynamic": ObjectiveConfig(
        kind="hybrid", noise_type="time", uniform_probability=0.2, weighting="dynamic"
    ),
    "block": ObjectiveConfig(kind="block", block_size=4),
    "block, clipped": ObjectiveConfig(kind="block", block_size=6, highest_mask_rate=0.8),
}
MODELS = {
    "tied": model_config(),
    "untied": model_config(untie_embeddings_and_output_weights=True, qk_layernorm=False),
    "gelu, full recompute": model_config(activation="gelu", recompute_granularity="full"),
    "squared relu, selective recompute": model_config(
        activation="squared_relu", recompute_granularity="selective"
    ),
}
RICH_LAYOUTS = (
    "micro 1",
    "DP2 overlapped",
    "TP2 + SP x PP2 + VPP2",
    "TP2 + SP x DP2",
    "CP2 by heads",
    "CP2 x TP2 + SP",
    "CP2 x PP2 + VPP2 by heads",
    "CP4",
)
"""Every axis is in one of them; on the others one objective shows that nothing is special."""
NUM_STEPS = {"elbo": 3, "curricula": 3}
"""Of the others two: what the optimizer keeps from step to step does not depend on the loss."""
_references: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}


def reference(
    ranks: RankPool, objective: str, model: str, *, documents: bool = False
) -> list[dict[str, Any]]:
    """The whole batch on one rank, computed once per session."""
    key = (objective, model, documents)
    if key not in _references:
        _references[key] = ranks.run(
            run_layout,
            layout("one", 1, micro=4),
            OBJECTIVES[objective],
            MODELS[model],
            NUM_STEPS.get(objective, 2),
            documents,
            num_ranks=1,
        )
    return _references[key]


def check_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Noise and initial weights bit for bit, losses to 1e-6, gradients to 1e-5."""
    noise = {index: row for result in ours for index, row in result["noise"].items()}
    assert noise == theirs[0]["noise"]
    initial, wanted = assemble(ours, "initial"), assemble(theirs, "initial")
    assert initial.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(initial[name], wanted[name], err_msg=name)
    for result in ours:
        for name, value in theirs[0]["first"].items():
            assert result["first"][name] == pytest.approx(value, rel=1e-6), name
        for step, entry in enumerate(theirs[0]["curve"]):
            for name, value in entry.items():
                tolerance = 1e-5 if name == "grad_norm" else 1e-6
                got = result["curve"][step][name]
                assert got == pytest.approx(value, rel=tolerance), f"step {step}: {name}"
    gradients, wanted = assemble(ours, "gradients"), assemble(theirs, "gradients")
    for name, values in wanted.items():
        scale = np.abs(values).max()
        assert scale > 0, f"{name} has no gradient"
        np.testing.assert_allclose(gradients[name], values, rtol=0, atol=1e-5 * scale, err_msg=name)


def run(
    ranks: RankPool,
    where: Layout,
    objective: str,
    model: ModelConfig,
    *,
    documents: bool = False,
) -> list[dict[str, Any]]:
    num_steps = NUM_STEPS.get(objective, 2)
    arguments = (where, OBJECTIVES[objective], model, num_steps, documents)
    return ranks.run(run_layout, *arguments, num_ranks=where.num_ranks)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        (where.name, objective)
        for where in LAYOUTS
        for objective in ("elbo", "autoregressive", "hybrid", "block")
        if objective == "elbo" or where.name in RICH_LAYOUTS
    ],
)
def test_every_layout(ranks: RankPool, name: str, objective: str) -> None:
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, where, objective, MODELS["tied"])
    check_equal(ours, reference(ranks, objective, "tied"))


@pytest.mark.parametrize(
    "objective",
    [
        "input masking",
        "count",
        "maskgit",
        "curricula",
        "uniform",
        "only masks",
        "dynamic",
        "block, clipped",
    ],
)
def test_other_objectives_on_the_richest_layout(ranks: RankPool, objective: str) -> None:
    where = next(where for where in LAYOUTS if where.name == "TP2 + SP x PP2 + VPP2")
    ours = run(ranks, where, objective, MODELS["tied"])
    check_equal(ours, reference(ranks, objective, "tied"))


@pytest.mark.parametrize(
    "model", ["untied", "gelu, full recompute", "squared relu, selective recompute"]
)
@pytest.mark.parametrize("name", ["TP2 + SP", "TP2 x PP2"])
def test_other_models(ranks: RankPool, name: str, model: str) -> None:
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, where, "elbo", MODELS[model])
    check_equal(ours, reference(ranks, "elbo", model))


@pytest.mark.parametrize(
    ("name", "objective", "model"),
    [
        ("micro 1", "autoregressive", "tied"),
        ("micro 8", "elbo", "tied"),
        ("TP2", "elbo", "tied"),
        ("TP2 + SP", "autoregressive", "tied"),
        ("PP2", "autoregressive", "tied"),
        ("PP2 + VPP2", "elbo", "tied"),
        ("DP2", "elbo", "tied"),
        ("TP2 + SP x PP2 + VPP2", "autoregressive", "tied"),
        ("PP4", "elbo", "tied"),
        ("TP2 x PP2", "elbo", "gelu, full recompute"),
        ("TP2 + SP", "elbo", "squared relu, selective recompute"),
        ("TP2 + SP x PP2 + VPP2", "uniform", "tied"),
        ("DP2", "dynamic", "tied"),
    ],
)
def test_documents_on_a_layout(ranks: RankPool, name: str, objective: str, model: str) -> None:
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, where, objective, MODELS[model], documents=True)
    check_equal(ours, reference(ranks, objective, model, documents=True))


@pytest.mark.parametrize("objective", ["autoregressive", "elbo", "uniform"])
def test_documents_change_the_loss_and_not_the_noise(ranks: RankPool, objective: str) -> None:
    [inside] = reference(ranks, objective, "tied", documents=True)
    [across] = reference(ranks, objective, "tied")
    assert inside["noise"] == across["noise"]
    assert abs(inside["first"]["nelbo"] - across["first"]["nelbo"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "objective", "model"),
    [
        ("micro 8", "hybrid", "untied"),
        ("TP2 + SP", "elbo", "tied"),
        ("PP2 + VPP2", "curricula", "untied"),
        ("DP2 overlapped", "block", "tied"),
        ("TP2 x PP2", "autoregressive", "tied"),
    ],
)
def test_chunks_of_the_loss(ranks: RankPool, name: str, objective: str, model: str) -> None:
    """Output layer and loss on 5 scored slots at a time are one more way to split the work."""
    where = next(where for where in LAYOUTS if where.name == name)
    ours = run(ranks, replace(where, loss_chunk_slots=5), objective, MODELS[model])
    check_equal(ours, reference(ranks, objective, model))


def test_the_check_notices_a_wrong_gradient(ranks: RankPool) -> None:
    one = reference(ranks, "elbo", "tied")
    key, shape, offset, values = one[0]["gradients"][0]
    wrong = {
        **one[0],
        "gradients": [(key, shape, offset, values * 1.0001), *one[0]["gradients"][1:]],
    }
    with pytest.raises(AssertionError, match="tolerance"):
        check_equal([wrong], one)
