"""Sections that say how weights are updated: optimizer and schedule.

Attribute docstrings are the `--help` text. Each section checks its own fields; `check_completep`
holds the rules between this section and the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require, require_fraction, require_positive

# Total strength of all residual branches, and width at which the logits are not scaled: the
# constants of "Scaling Behavior of Discrete Diffusion Language Models", table 5.
_RESIDUAL_STRENGTH = 4.0
_OUTPUT_WIDTH = 512.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or LaProp, sharded over the data-parallel ranks, and how its settings scale."""

    kind: Literal["adamw", "laprop"] = "adamw"
    """adamw; laprop: divides by the second moment before the momentum is taken, not after it."""
    lr: float = 2e-4
    """Peak learning rate; with completep a rate for all sizes (0.3 is usual), see there."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases are exempt."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_beta2_by_batch: dict[int, float] = field(default_factory=dict)
    """Samples in one step -> adam_beta2 from this batch size on, such as {256: 0.98}."""
    adam_eps: float = 1e-8
    """Epsilon of Adam and LaProp; completep divides it by hidden_size * num_layers."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    parametrization: Literal["standard", "completep"] = "standard"
    """standard: one rate for all, weights of std init_method_std. completep: rates, decay, epsilon
    and weights scale with width and depth so that one lr serves all sizes; it needs
    model.residual_multiplier 4 / num_layers and model.output_multiplier 512 / hidden_size."""
    bulk_init_scale: float = 0.4
    """completep: matrices of the layers start with std bulk_init_scale / sqrt(hidden_size) and
    learn at lr / hidden_size, with decay weight_decay * hidden_size; embedding and output layer
    start as always."""
    auxiliary_lr_scale: float = 0.02
    """completep: embedding, output layer, norms and biases learn at this share of lr, without
    decay."""

    def __post_init__(self) -> None:
        require_positive("optimizer", {"lr": self.lr, "adam_eps": self.adam_eps})
        betas = {"adam_beta1": self.adam_beta1, "adam_beta2": self.adam_beta2}
        require_fraction("optimizer", betas, below_one=True)
        for batch_size, beta in self.adam_beta2_by_batch.items():
            require(
                batch_size > 0 and 0 <= beta < 1,
                f"optimizer.adam_beta2_by_batch has {batch_size}: {beta}; it maps batch sizes of "
                "at least 1 to values in [0, 1)",
            )
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}; must be >= 0")
        scales = ("bulk_init_scale", "auxiliary_lr_scale")
        require_positive("optimizer", {name: getattr(self, name) for name in scales})
        for name in scales:
            is_default = getattr(self, name) == self.__dataclass_fields__[name].default
            require(
                self.parametrization == "completep" or is_default,
                f"optimizer.{name} has no meaning for optimizer.parametrization "
                f"{self.parametrization}; remove it or use completep",
            )

    def for_batch(self, global_batch_size: int) -> OptimizerConfig:
        """The same with `adam_beta2` for this many samples in one step."""
        reached = [size for size in self.adam_beta2_by_batch if size <= global_batch_size]
        beta2 = self.adam_beta2_by_batch[max(reached)] if reached else self.adam_beta2
        return replace(self, adam_beta2=beta2, adam_beta2_by_batch={})


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate against the step."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after the warmup; wsd is warmup, stable, decay."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    decay_fraction: float = 0.1
    """wsd: share of all steps spent in the decay."""
    decay_kind: Literal["exponential", "linear", "one_minus_sqrt", "cosine"] = "exponential"
    """wsd: shape of the decay."""

    def __post_init__(self) -> None:
        require(
            self.warmup_steps >= 0, f"schedule.warmup_steps is {self.warmup_steps}; it must be >= 0"
        )
        require_fraction(
            "schedule", {"min_lr_ratio": self.min_lr_ratio, "decay_fraction": self.decay_fraction}
        )


@dataclass(frozen=True)
class Multipliers:
    """What a forward pass multiplies, by the names of the model's fields."""

    residual_multiplier: float
    """Of what attention and MLP add to the residual stream."""
    output_multiplier: float
    """Of the logits."""


def completep_multipliers(num_layers: int, hidden_size: int) -> Multipliers:
    """What CompleteP suggests: 4 / num_layers and 512 / hidden_size.

    Source: "Scaling Behavior of Discrete Diffusion Language Models", table 5. Only the
    proportions matter for the transfer; the constants go with its initial weights and rates.
    """
    return Multipliers(_RESIDUAL_STRENGTH / num_layers, _OUTPUT_WIDTH / hidden_size)


def check_completep(optimizer: OptimizerConfig, model: ModelConfig) -> None:
    """Refuse a completep run of a model that is not built for it (ValueError)."""
    if optimizer.parametrization != "completep":
        return
    require(
        model.untie_embeddings_and_output_weights,
        "optimizer.parametrization completep scales the output layer apart from the embedding; set "
        "model.untie_embeddings_and_output_weights true",
    )
    suggested = completep_multipliers(model.num_layers, model.hidden_size)
    for name in ("residual_multiplier", "output_multiplier"):
        wanted, value = getattr(suggested, name), getattr(model, name)
        require(
            value != 1.0 or math.isclose(wanted, 1.0),
            f"model.{name} is 1.0, which does not scale with the size of the model as "
            f"optimizer.parametrization completep asks; use {wanted:.6g}",
        )
