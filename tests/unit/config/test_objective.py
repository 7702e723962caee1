"""The objective section: what is refused, and what attention each kind needs."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "foreign_schedule": (
        {"kind": "hybrid", "schedule": "cosine"},
        "objective.schedule has no meaning for objective.kind hybrid; remove it",
    ),
    "foreign_noise": (
        {"noise_type": "uniform"},
        "objective.noise_type has no meaning for objective.kind masked; remove it",
    ),
    "foreign_block": (
        {"kind": "hybrid", "block_size": 8},
        "objective.block_size has no meaning for objective.kind hybrid; remove it",
    ),
    "foreign_curriculum": (
        {"kind": "block", "time_curriculum_steps": 8},
        "objective.time_curriculum_steps has no meaning for objective.kind block; remove it",
    ),
    "weighting_of_hybrid": (
        {"kind": "hybrid", "weighting": "maskgit"},
        "objective.weighting maskgit is none of objective.kind hybrid; use elbo or surrogate or "
        "dynamic",
    ),
    "weighting_of_masked": (
        {"weighting": "surrogate"},
        "objective.weighting surrogate is none of objective.kind masked; use elbo or count or "
        "unweighted or maskgit",
    ),
    "count_with_schedule": (
        {"weighting": "count", "schedule": "cosine"},
        "objective.weighting count draws the number of masks uniformly, which is the linear "
        "schedule; objective.schedule is cosine",
    ),
    "dynamic_without_time": (
        {"kind": "hybrid", "weighting": "dynamic"},
        "objective.weighting dynamic is made for objective.noise_type time, not balanced; use "
        "surrogate",
    ),
    "probability_without_time": (
        {"kind": "hybrid", "uniform_probability": 0.2},
        "objective.uniform_probability belongs to objective.noise_type time, not balanced; use "
        "objective.noise_bias",
    ),
    "time_with_bias": (
        {"kind": "hybrid", "noise_type": "time", "noise_bias": 1.0},
        "objective.noise_type time mixes by objective.uniform_probability; remove "
        "objective.noise_bias and objective.noise_scale",
    ),
    "two_kinds_of_noise": (
        {"kind": "hybrid", "noise_type": "uniform", "noise_bias": 1.0},
        "objective.noise_bias 1.0 and objective.noise_type uniform name two kinds of noise; remove "
        "one",
    ),
    "bias_without_end": (
        {"kind": "hybrid", "noise_bias": float("inf")},
        "objective.noise_bias is inf; use 1000 or -1000 for all uniform or all masks",
    ),
    "steep": (
        {"kind": "hybrid", "noise_scale": 1.5},
        "objective.noise_scale is 1.5; it must lie in [0, 1]",
    ),
    "all_uniform_at_half": (
        {"kind": "hybrid", "noise_type": "time", "uniform_probability": 1.0},
        "objective.uniform_probability is 1.0; it must lie in [0, 1)",
    ),
    "too_much_context": (
        {"kind": "hybrid", "prompt_share": 0.7, "infilling_share": 0.4},
        "objective.prompt_share 0.7 and objective.infilling_share 0.4 add up to more than 1; no "
        "sample is both",
    ),
    "only_empty": (
        {"kind": "hybrid", "empty_token_share": 1.0},
        "objective.empty_token_share is 1.0; it must lie in [0, 1)",
    ),
    "negative_steps": (
        {"attention_annealing_steps": -1},
        "objective.attention_annealing_steps is -1; it must be at least 0",
    ),
    "no_width": (
        {"time_curriculum_width": 0.0},
        "objective.time_curriculum_width is 0.0; it must be greater than 0",
    ),
    "no_rates": (
        {"kind": "block", "lowest_mask_rate": 0.5, "highest_mask_rate": 0.5},
        "objective.lowest_mask_rate 0.5 must be below objective.highest_mask_rate 0.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        ObjectiveConfig(**fields)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"kind": "autoregressive"}, AttentionPattern.CAUSAL),
        ({}, AttentionPattern.BIDIRECTIONAL),
        ({"attention_annealing_steps": 10}, AttentionPattern.ARBITRARY),
        ({"kind": "hybrid"}, AttentionPattern.BIDIRECTIONAL),
        ({"kind": "hybrid", "independent_noise_share": 1.0}, AttentionPattern.BIDIRECTIONAL),
        ({"kind": "hybrid", "prompt_share": 0.2}, AttentionPattern.ARBITRARY),
        ({"kind": "hybrid", "infilling_share": 0.2}, AttentionPattern.ARBITRARY),
        ({"kind": "block"}, AttentionPattern.BLOCK),
    ],
)
def test_attention_pattern(fields: dict[str, Any], pattern: AttentionPattern) -> None:
    config = ObjectiveConfig(**fields)
    assert config.attention is pattern
    assert config.needs_mask is (config.kind != "autoregressive")
