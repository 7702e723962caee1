"""Laws that papers published, with where they were measured.

"Scaling Behavior of Discrete Diffusion Language Models", sections 4.2 to 4.5, tables 1, 6 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.scaling.power_law import PowerLaw


@dataclass(frozen=True)
class PublishedOptimum:
    """Compute-optimal laws of one noise type; x is compute in FLOPs, without embeddings."""

    flops_per_token: PowerLaw
    tokens: PowerLaw
    parameters: PowerLaw
    loss_nats: PowerLaw


NOISE_TYPES = {
    "masked": PublishedOptimum(
        PowerLaw(0.01761, 0.566),
        PowerLaw(56.79, 0.434),
        PowerLaw(1.7e-4, 0.623),
        PowerLaw(27.219, -0.0496),
    ),
    "low-uniform": PublishedOptimum(
        PowerLaw(0.06529, 0.535),
        PowerLaw(15.32, 0.465),
        PowerLaw(6.9e-4, 0.590),
        PowerLaw(29.120, -0.0509),
    ),
    "balanced": PublishedOptimum(
        PowerLaw(0.06918, 0.534),
        PowerLaw(14.46, 0.466),
        PowerLaw(7.2e-4, 0.589),
        PowerLaw(29.841, -0.0512),
    ),
    "high-uniform": PublishedOptimum(
        PowerLaw(0.01222, 0.573),
        PowerLaw(81.86, 0.427),
        PowerLaw(1.1e-4, 0.631),
        PowerLaw(30.194, -0.0514),
    ),
    "uniform": PublishedOptimum(
        PowerLaw(0.00618, 0.589),
        PowerLaw(161.9, 0.411),
        PowerLaw(5e-5, 0.648),
        PowerLaw(31.262, -0.0522),
    ),
}
"""Fitted between 5e17 and 2e20 FLOPs on web text; learning rates are not annealed (annealing lowers
the loss by a factor of 1.0245)."""

BATCH_TOKENS = PowerLaw(10**-2.40, 0.8225)
"""Best batch size in tokens, x the tokens of the run; independent of the model size."""

LEARNING_RATE = PowerLaw(10**-2.06, 0.3412)
"""Best base learning rate of CompleteP with LaProp, x the batch size in tokens."""

ANNEALING_GAIN = 1.0245
"""Loss without annealing over loss with it, at every size (99 % interval: 0.0014 either way)."""
