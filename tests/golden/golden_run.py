"""Twenty fp32 steps of a tiny run, as printed in full precision; run inside one rank."""

from __future__ import annotations

from pathlib import Path

from tiny_run import layout, model_config, run_layout

from megatron_dlm.config.objective import ObjectiveConfig

NUM_STEPS = 20
OBJECTIVES = {
    "autoregressive": ObjectiveConfig(kind="autoregressive"),
    "masked_elbo": ObjectiveConfig(kind="masked"),
    "masked_count": ObjectiveConfig(kind="masked", weighting="count"),
    "hybrid": ObjectiveConfig(
        kind="hybrid", weighting="surrogate", independent_noise_share=0.5, prompt_share=0.2
    ),
    "block": ObjectiveConfig(kind="block", block_size=4),
}
DIRECTORY = Path(__file__).parent


def golden_curve(objective: str) -> list[tuple[float, float]]:
    """(nelbo, gradient norm) of every step."""
    where = layout("one", 1, micro=4)
    result = run_layout(where, OBJECTIVES[objective], model_config(), NUM_STEPS)
    return [(entry["nelbo"], entry["grad_norm"]) for entry in result["curve"]]
