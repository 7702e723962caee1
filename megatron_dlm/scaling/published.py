"""Laws and measurements that papers published, with where they were measured.

"Scaling Behavior of Discrete Diffusion Language Models" (SBD), sections 4.2 to 4.5, tables 1, 6 and
7; "Training Optimal Large Diffusion Language Models" (Quokka); "Diffusion Language Models are Super
Data Learners" (SDL); Hoffmann et al. 2022 (Chinchilla); Muennighoff et al. 2023.
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
"""Fitted between 5e17 and 2e20 FLOPs on web text; learning rates are not annealed. By these losses
uniform noise is above masks by 3.1 % at 1e18 FLOPs, 1.3 % at 1e21 and 0.7 % at 1e22; the pair of 3B
runs (LARGE_RUNS) ended 1.7 % apart."""

BATCH_TOKENS = PowerLaw(10**-2.40, 0.8225)
"""Best batch size in tokens, x the tokens of the run; independent of the model size."""

LEARNING_RATE = PowerLaw(10**-2.06, 0.3412)
"""Best base learning rate of CompleteP with LaProp, x the batch size in tokens."""

ANNEALING_GAIN = 1.0245
"""Loss without annealing over loss with it, of 40 pairs of runs of 25M and 85M parameters on
4.2B tokens each (99 % interval: 0.0014 either way). Of LARGE_RUNS it is 1.028 to 1.031, outside of
that; their losses before annealing may be those of fewer tokens."""

COMPUTE_RANGE_FLOPS = (5e17, 2e20)
"""Of the laws in NOISE_TYPES."""


@dataclass(frozen=True)
class PublishedRun:
    """One of SBD's large runs, the last fifth of it annealed."""

    noise: str
    flops: float
    before_annealing_nats: float
    """The sources at hand do not say at which step; annealing begins at 80 % of the tokens."""
    final_nats: float

    @property
    def excess(self) -> float:
        """Final loss over the law at the whole compute, lowered by ANNEALING_GAIN."""
        return self.final_nats * ANNEALING_GAIN / NOISE_TYPES[self.noise].loss_nats(self.flops)


LARGE_RUNS = (
    PublishedRun("masked", 1e21, 2.495, 2.422),
    PublishedRun("uniform", 1e21, 2.538, 2.462),
    PublishedRun("uniform", 1e22, 2.275, 2.214),
)
"""3B, 3B and 10B parameters, far outside of what the laws were fitted on."""

BATCH_RANGE_TOKENS = (8 * 2048.0, 512 * 2048.0)
"""Batch sizes of the grid behind BATCH_TOKENS and LEARNING_RATE. The released list of runs has
batches of 1024 x 2048 too, at 570M parameters only."""

BITS_PER_BYTE = 0.34124
"""Of SBD's tokenizer and text, per nat per token: 4.2278 bytes per token."""

_EPOCHS_AT = (10e9, 1e12, 1100.0)
"""Parameters, unique tokens, best epochs: Quokka's example, which fixes the constant of its law."""


def best_epochs(parameters: float, unique_tokens: float) -> float:
    """Epochs after which the validation loss of masked diffusion is lowest, U^0.39 / N^0.55.

    Quokka. More epochs overfit. The range that it was fitted on is not in the sources at hand.
    """
    at_parameters, at_unique, epochs = _EPOCHS_AT
    return float(
        epochs * (unique_tokens / at_unique) ** 0.39 / (parameters / at_parameters) ** 0.55
    )


@dataclass(frozen=True)
class PublishedCrossover:
    """Epochs from which masked diffusion is better than AR of the same size on the same data."""

    parameters: float
    unique_tokens: float
    hellaswag: float
    mmlu: float
    loss: float | None
    """Of the validation loss, where it was shown."""
    mmlu_range: tuple[float, float] | None = None
    """Between which epochs the curves of MMLU cross, where noise leaves that open."""


CROSSOVERS = (
    PublishedCrossover(1e9, 0.5e9, 35, 45, None, mmlu_range=(35, 55)),
    PublishedCrossover(1e9, 1e9, 44, 42, 14, mmlu_range=(38, 70)),
    PublishedCrossover(1e9, 1.5e9, 58, 63, 26, mmlu_range=(63, 64)),
    PublishedCrossover(2e9, 1e9, 24, 20, None),
    PublishedCrossover(4e9, 1e9, 21.5, 21, None),
    PublishedCrossover(8e9, 1e9, 17.5, 27, None),
)
"""SDL, six pairs of runs on two metrics, read off its figures (2 epochs either way); sizes are by
their labels. MMLU: 45 and 42 are midpoints, of 35 to 55 and of 38 to 46 with noise up to 70; 63 is
the last but one of 64 epochs, where both end equal."""

NOT_CROSSED = ((1e9, 10e9, 9.6), (1e9, 96e9, 1.0))
"""Parameters, unique tokens and epochs of SDL's pairs of runs in which AR stayed better."""

CHINCHILLA = (70e9, 1.4e12)
"""Parameters and tokens of the AR model that was trained compute-optimally."""
CHINCHILLA_EXPONENTS = (0.49, 0.51)
"""Of parameters and tokens in compute (approach 2; DeepSeek: 0.524 and 0.476)."""
CHINCHILLA_RANGE_FLOPS = (6e18, 3e21)
"""Budgets behind the exponents; the model itself took 5.9e23."""

HALF_LIFE_EPOCHS = 15.4
"""R of repeated data in AR training (Muennighoff et al. 2023); 4 epochs cost next to nothing."""
