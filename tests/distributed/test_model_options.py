"""Every model option and attention pattern: against float64, and the same on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opened import GLOBAL_BATCH, VOCAB_SIZE
from option_runs import assemble_logits, hiding_mask, logits_of, run_options, twofold
from rank_pool import RankPool
from reference_model import reference_logits
from resume_run import write_shards
from test_invariance import check_equal
from test_resume import TP2_PP2, check_metrics, final_tensors, killed_after_five, train
from tiny_run import LAYOUTS, Layout, assemble, layout, model_config, run_layout, token_batch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig

ALONE = layout("one", 1, micro=4)
EVERYTHING = {
    "activation": "squared_relu",
    "mlp_bias": True,
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 5.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.5,
    "output_multiplier": 3.0,
    "untie_embeddings_and_output_weights": True,
}
MODELS = {
    "none": model_config(),
    "biases": model_config(mlp_bias=True),
    "biases, squared relu": model_config(mlp_bias=True, activation="squared_relu"),
    "full norm": model_config(qk_layernorm_scope="full"),
    "soft cap": model_config(attn_logit_softcapping=2.0),
    "sink": model_config(attention_sink=True, num_query_groups=4),
    "zero-centred": model_config(layernorm_zero_centered_gamma=True),
    "multipliers": model_config(residual_multiplier=0.3, output_multiplier=5.0, mlp_bias=True),
    "everything": model_config(**EVERYTHING),
    "everything, selective recompute": model_config(
        **EVERYTHING, recompute_granularity="selective"
    ),
    "everything, full recompute": model_config(**EVERYTHING, recompute_granularity="full"),
}
WHOLE_SHAPES = {  # what a checkpoint holds of 4 layers, 4 heads in 2 groups, 8 wide
    "self_attention.core_attention.sink_key": (4, 2, 8),
    "self_attention.core_attention.sink_value": (4, 2, 8),
    "self_attention.q_layernorm.weight": (4, 32),
    "self_attention.k_layernorm.weight": (4, 16),
    "mlp.linear_fc1.bias": (4, 128),
    "mlp.linear_fc2.bias": (4, 32),
}
OBJECTIVES = {
    "causal": ObjectiveConfig(kind="autoregressive"),
    "bidirectional": ObjectiveConfig(kind="masked"),
    "arbitrary": ObjectiveConfig(kind="hybrid", prompt_share=0.5),
    "block": ObjectiveConfig(kind="block", block_size=4),
    "one block": ObjectiveConfig(kind="block", block_size=16),
    "blocks of one": ObjectiveConfig(kind="block", block_size=1),
    "uneven block": ObjectiveConfig(kind="block", block_size=6),
}
PATTERNS = ["causal", "arbitrary", "block", "uneven block"]
_references: dict[tuple[str, str], list[dict[str, Any]]] = {}


def on_one_rank(ranks: RankPool, model: str, objective: str) -> list[dict[str, Any]]:
    key = (model, objective)
    if key not in _references:
        arguments = (ALONE, MODELS[model], OBJECTIVES[objective])
        _references[key] = ranks.run(run_options, *arguments, num_ranks=1)
    return _references[key]


def visible_slots(objective: ObjectiveConfig, length: int) -> Tensor:
    """bool [b or 1, s, s], slot by slot."""
    everything = torch.ones(1, length, length, dtype=torch.bool)
    if objective.attention is AttentionPattern.CAUSAL:
        return everything.tril()
    if objective.attention is AttentionPattern.ARBITRARY:
        return ~hiding_mask(torch.arange(GLOBAL_BATCH), length)[:, 0]
    if objective.attention is AttentionPattern.BIDIRECTIONAL:
        return everything
    half = length // 2
    for query in range(length):
        for key in range(length):
            mine, other = query % half // objective.block_size, key % half // objective.block_size
            if key < half:
                everything[0, query, key] = query < half and mine == other
            else:
                everything[0, query, key] = other < mine if query < half else other <= mine
    return everything


def reference(
    weights: dict[str, np.ndarray], model: ModelConfig, objective: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [slots, V] and gradients in float64, from the weights of the whole model."""
    exact = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    for value in exact.values():
        value.requires_grad_()
    batch = token_batch(0, GLOBAL_BATCH, model.seq_length, documents=False)
    tokens = batch.tokens[:, :-1]
    place = torch.arange(model.seq_length, dtype=torch.float64)
    if objective.attention is AttentionPattern.BLOCK:
        tokens, place = twofold(tokens), place.repeat(2)
    visible = visible_slots(objective, tokens.shape[1])
    logits = reference_logits(exact, model, tokens, visible, place)
    number = torch.arange(GLOBAL_BATCH)[:, None] * 1000 + torch.arange(tokens.shape[1])
    targets = (tokens + number) % VOCAB_SIZE
    log_probs = logits[:, :, :VOCAB_SIZE].log_softmax(2)
    nats = -log_probs.gather(2, targets[:, :, None])[:, :, 0]
    (nats * (1 + number % 7)).sum().div(tokens.numel()).backward()
    gradients = {name: value.grad for name, value in exact.items() if value.grad is not None}
    return logits.detach().flatten(0, 1), gradients


def check_logits(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = float(np.abs(theirs).max())  # 4 to 20
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(scale / 5, 1.0))


def check_gradients(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        scale = float(np.abs(wanted).max())
        assert scale > 0, f"{name} has no gradient"
        atol = tolerance * scale
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        *[(model, "bidirectional") for model in MODELS],
        *[(model, name) for name in PATTERNS for model in ("none", "everything")],
        *[(f"everything, {kind} recompute", "arbitrary") for kind in ("selective", "full")],
        *[(f"everything, {kind} recompute", "block") for kind in ("selective", "full")],
    ],
)
def test_logits_and_gradients_equal_float64(ranks: RankPool, model: str, objective: str) -> None:
    results = on_one_rank(ranks, model, objective)
    weights = assemble(results, "weights")
    logits, gradients = reference(weights, MODELS[model], OBJECTIVES[objective])
    # What fp32 loses on its way through four layers.
    check_logits(assemble_logits(results), logits.numpy(), tolerance=3e-5)
    wanted = {name: value.numpy() for name, value in gradients.items()}
    check_gradients(assemble(results, "gradients"), wanted, tolerance=3e-5)


RICHEST = "TP2 + SP x PP2 + VPP2"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *[(model, "TP2") for model in MODELS if model != "none"],
        *[("everything", name) for name in ("TP2 + SP", "PP2", "PP2 + VPP2", RICHEST)],
        ("everything, full recompute", RICHEST),
        ("full norm", "TP2 + SP"),
        ("biases", "TP2 + SP"),
    ],
)
def test_options_on_a_layout(ranks: RankPool, model: str, name: str) -> None:
    compare(ranks, model, "bidirectional", name)


@pytest.mark.parametrize("objective", PATTERNS)
@pytest.mark.parametrize("name", ["TP2", RICHEST])
@pytest.mark.parametrize("model", ["none", "everything"])
def test_patterns_on_a_layout(ranks: RankPool, model: str, name: str, objective: str) -> None:
    compare(ranks, model, objective, name)


def compare(ranks: RankPool, model: str, objective: str, name: str) -> None:
    where: Layout = next(where for where in LAYOUTS if where.name == name)
    arguments = (where, MODELS[model], OBJECTIVES[objective])
    ours = ranks.run(run_options, *arguments, num_ranks=where.num_ranks)
    theirs = on_one_rank(ranks, model, objective)
    check_logits(assemble_logits(ours), assemble_logits(theirs))
    check_gradients(assemble(ours, "gradients"), assemble(theirs, "gradients"))


@pytest.mark.parametrize(
    ("name", "documents"), [("TP2 + SP", False), (RICHEST, False), ("TP2", True)]
)
def test_training_with_every_option(ranks: RankPool, name: str, documents: bool) -> None:
    """From the initial weights, over three updates, with the norm of the whole gradient."""
    where = next(where for where in LAYOUTS if where.name == name)
    arguments = (ObjectiveConfig(), MODELS["everything"], 3, documents)
    ours = ranks.run(run_layout, where, *arguments, num_ranks=where.num_ranks)
    check_equal(ours, ranks.run(run_layout, ALONE, *arguments, num_ranks=1))


def logits(ranks: RankPool, model: str, objective: str, *tokens: Tensor) -> list[Tensor]:
    arguments = (MODELS[model], OBJECTIVES[objective], tokens)
    [found] = ranks.run(logits_of, *arguments, num_ranks=1)
    return found


def noisy_and_clean() -> tuple[Tensor, Tensor]:
    """int64 [2, 16] each."""
    clean = token_batch(0, 2, 16, documents=False).tokens[:, :-1]
    return twofold(clean)[:, :16], clean


@pytest.mark.parametrize("model", ["none", "everything"])
def test_one_block_is_bidirectional(ranks: RankPool, model: str) -> None:
    noisy, clean = noisy_and_clean()
    [both] = logits(ranks, model, "one block", torch.cat([noisy, clean], dim=1))
    of_noise, of_text = logits(ranks, model, "bidirectional", noisy, clean)
    torch.testing.assert_close(both[:, :16], of_noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(both[:, 16:], of_text, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["none", "everything"])
def test_the_clean_half_of_blocks_of_one_is_causal(ranks: RankPool, model: str) -> None:
    noisy, clean = noisy_and_clean()
    [both] = logits(ranks, model, "blocks of one", torch.cat([noisy, clean], dim=1))
    [causal] = logits(ranks, model, "causal", clean)
    torch.testing.assert_close(both[:, 16:], causal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["none", "everything"])
def test_what_an_edited_block_changes(ranks: RankPool, model: str) -> None:
    """Clean block 1 of 4: later noisy blocks, and the clean ones from it on. Noisy: itself."""
    tokens = torch.cat(noisy_and_clean(), dim=1)
    clean, noisy = tokens.clone(), tokens.clone()
    clean[:, 16 + 5] = (clean[:, 16 + 5] + 1) % VOCAB_SIZE
    noisy[:, 5] = (noisy[:, 5] + 1) % VOCAB_SIZE
    before, of_clean, of_noisy = logits(ranks, model, "block", tokens, clean, noisy)
    slot = torch.arange(32)
    later_noisy, from_it_on = (slot >= 8) & (slot < 16), slot >= 16 + 4
    for after, may_change in (
        (of_clean, later_noisy | from_it_on),
        (of_noisy, (slot >= 4) & (slot < 8)),
    ):
        changed = (after != before).any(2)
        assert changed[:, may_change].all()
        assert not changed[:, ~may_change].any()


def test_checkpoint_continues_on_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Weights and optimizer state of every option, from one rank to TP2 x PP2."""
    flags = [f"--model.{name}={str(value).lower()}" for name, value in EVERYTHING.items()]
    # The first updates of Adam have the size of lr also where a gradient is rounding noise.
    flags += ["--model.num_query_groups=2", "--optimizer.adam_eps=1e-5"]
    shards = write_shards(tmp_path / "shards")
    whole = train(ranks, shards, tmp_path / "whole", flags)
    split = killed_after_five(tmp_path / "whole", tmp_path / "split")
    ours = train(ranks, shards, split, [*flags, *TP2_PP2], num_ranks=4)
    check_metrics(ours, whole, tolerance=1e-5)
    tensors = final_tensors(ranks, tmp_path / "whole")
    shapes = {name: tensors[f"decoder.layers.{name}"].shape for name in WHOLE_SHAPES}
    assert shapes == WHOLE_SHAPES
    found = final_tensors(ranks, split)
    for name, values in tensors.items():
        atol = 1e-4 * np.abs(values).max()
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)
