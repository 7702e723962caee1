"""The section that says what is learned.

Attribute docstrings are the `--help` text; rules that span sections live in `config/validate.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive


class AttentionPattern(Enum):
    """Which keys a query may see."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    ARBITRARY = "arbitrary"
    """As the objective's attention mask says; everything where it has none."""
    BLOCK = "block"
    """Of [corrupted; clean]: the own corrupted block and all clean ones before; clean: up to it."""


ObjectiveKind = Literal["autoregressive", "masked", "hybrid", "block"]

_KINDS_OF_FIELD: dict[str, tuple[str, ...]] = {
    "input_masking_ratio": ("autoregressive",),
    "schedule": ("masked", "block"),
    "schedule_exponent": ("masked", "block"),
    "weighting": ("masked", "hybrid", "block"),
    "time_sampling": ("masked", "hybrid", "block"),
    "time_floor": ("masked", "block"),
    "time_curriculum_steps": ("masked",),
    "time_curriculum_width": ("masked",),
    "variable_length_probability": ("masked",),
    "variable_length_multiple": ("masked",),
    "attention_annealing_steps": ("masked",),
    "noise_type": ("hybrid",),
    "noise_bias": ("hybrid",),
    "noise_scale": ("hybrid",),
    "uniform_probability": ("hybrid",),
    "independent_noise_share": ("hybrid",),
    "prompt_share": ("hybrid",),
    "infilling_share": ("hybrid",),
    "empty_token_share": ("hybrid",),
    "pad_token_id": ("hybrid",),
    "block_size": ("block",),
    "lowest_mask_rate": ("block",),
    "highest_mask_rate": ("block",),
}

_WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "masked": ("elbo", "count", "unweighted", "maskgit"),
    "hybrid": ("elbo", "surrogate", "dynamic"),
    "block": ("elbo", "count", "unweighted"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned. Fields of another kind must keep their defaults."""

    kind: ObjectiveKind = "masked"
    """autoregressive: next-token prediction; masked: masked (absorbing) diffusion; hybrid: noise
    between masked and uniform; block: masked diffusion in blocks from left to right."""
    input_masking_ratio: float = 0.0
    """autoregressive: share of training inputs replaced by the mask; targets stay clean."""
    schedule: Literal["linear", "cosine", "polynomial"] = "linear"
    """masked, block: alpha(t), the share of tokens still clean at time t."""
    schedule_exponent: float = 2.0
    """masked, block: w of the polynomial schedule alpha(t) = 1 - t^w."""
    weighting: Literal["elbo", "count", "unweighted", "maskgit", "surrogate", "dynamic"] = "elbo"
    """Trained weight. masked, block: elbo and count are the bound, unweighted and maskgit (masked
    only) are not. hybrid: elbo is the bound, surrogate leaves out its 1 / p(log-SNR), dynamic is
    that of GIDD (2 on masks, 1 on other noise)."""
    time_sampling: Literal["stratified", "iid"] = "stratified"
    """Diffusion: noise levels spread evenly over the global batch, or independent per sample."""
    time_floor: float = 1e-3
    """masked, block: smallest noise time t; keeps the weight 1/t finite."""
    time_curriculum_steps: int = 0
    """masked: over this many steps training draws times around a mean that moves from clean (0) to
    noisy (1), afterwards as ever; 0 is no curriculum."""
    time_curriculum_width: float = 0.2
    """masked: standard deviation of the times around the mean of the curriculum."""
    variable_length_probability: float = 0.0
    """masked: share of training steps whose samples are cropped to one random length."""
    variable_length_multiple: int = 16
    """masked: cropped lengths are multiples of this, whatever the layout (SP and FP8 need one)."""
    attention_annealing_steps: int = 0
    """masked: over this many steps attention turns from causal to bidirectional: each key behind a
    query is seen with a probability that rises from 0 to 1; for models that were autoregressive."""
    noise_type: Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform", "time"] = (
        "balanced"
    )
    """hybrid: noise at log-SNR l is a uniform token with probability sigmoid(a l + b), else the
    mask; b = -1000, -2, 0, 2, 1000 by name; time: GIDD's mixing by uniform_probability."""
    noise_bias: float | None = None
    """hybrid: b itself, instead of the one of noise_type."""
    noise_scale: float = 1.0
    """hybrid: a in [0, 1], how fast noise turns from uniform to mask as it grows; 0: not at all."""
    uniform_probability: float = 0.0
    """hybrid, noise_type time: GIDD's p_u, the largest share of uniform tokens (at t = 1/2)."""
    independent_noise_share: float = 0.0
    """hybrid: share of training samples whose tokens each have a noise level of their own
    (diffusion forcing)."""
    prompt_share: float = 0.0
    """hybrid: share of training samples with a clean prompt, not scored and blind to what is
    behind it."""
    infilling_share: float = 0.0
    """hybrid: share of training samples with clean tokens at random places, treated as a prompt
    is; none has both."""
    empty_token_share: float = 0.0
    """hybrid: up to this share of a training sample becomes pad tokens at random places; the text
    moves back, its end is cut off."""
    block_size: int = 4
    """block: tokens in one block; 1 is autoregressive, model.seq_length is masked diffusion."""
    lowest_mask_rate: float = 0.0
    """block: train on mask rates from here on only; validation uses all of them."""
    highest_mask_rate: float = 1.0
    """block: train on mask rates up to here only."""
    mask_token_id: int | None = None
    """Id of the mask token; default: read from the tokenizer."""
    pad_token_id: int | None = None
    """hybrid: id of empty tokens; default: read from the tokenizer where empty tokens are asked."""

    def __post_init__(self) -> None:
        self._check_fractions()
        require(
            0 < self.time_floor < 1,
            f"objective.time_floor is {self.time_floor}; it must lie in (0, 1)",
        )
        require_positive(
            "objective",
            {
                "schedule_exponent": self.schedule_exponent,
                "variable_length_multiple": self.variable_length_multiple,
                "time_curriculum_width": self.time_curriculum_width,
                "block_size": self.block_size,
            },
        )
        for name in ("time_curriculum_steps", "attention_annealing_steps"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name} is {value}; it must be at least 0")
        self._check_kind()
        self._check_noise()

    def _check_fractions(self) -> None:
        names = (
            "input_masking_ratio",
            "variable_length_probability",
            "independent_noise_share",
            "prompt_share",
            "infilling_share",
            "noise_scale",
            "lowest_mask_rate",
            "highest_mask_rate",
        )
        require_fraction("objective", {name: getattr(self, name) for name in names})
        below_one = ("empty_token_share", "uniform_probability")
        fractions = {name: getattr(self, name) for name in below_one}
        require_fraction("objective", fractions, below_one=True)
        require(
            self.input_masking_ratio <= 0.9,
            f"objective.input_masking_ratio is {self.input_masking_ratio}; it must be at most 0.9",
        )
        require(
            self.lowest_mask_rate < self.highest_mask_rate,
            f"objective.lowest_mask_rate {self.lowest_mask_rate} must be below "
            f"objective.highest_mask_rate {self.highest_mask_rate}",
        )
        require(
            self.prompt_share + self.infilling_share <= 1,
            f"objective.prompt_share {self.prompt_share} and objective.infilling_share "
            f"{self.infilling_share} add up to more than 1; no sample is both",
        )

    def _check_kind(self) -> None:
        for name, kinds in _KINDS_OF_FIELD.items():
            default = self.__dataclass_fields__[name].default
            require(
                self.kind in kinds or getattr(self, name) == default,
                f"objective.{name} has no meaning for objective.kind {self.kind}; remove it",
            )
        known = _WEIGHTINGS.get(self.kind, ("elbo",))
        require(
            self.weighting in known,
            f"objective.weighting {self.weighting} is none of objective.kind {self.kind}; use "
            + " or ".join(known),
        )
        require(
            self.weighting != "count" or self.schedule == "linear",
            f"objective.weighting count draws the number of masks uniformly, which is the linear "
            f"schedule; objective.schedule is {self.schedule}",
        )

    def _check_noise(self) -> None:
        is_time = self.noise_type == "time"
        require(
            is_time or self.uniform_probability == 0,
            f"objective.uniform_probability belongs to objective.noise_type time, not "
            f"{self.noise_type}; use objective.noise_bias",
        )
        require(
            is_time or self.weighting != "dynamic",
            f"objective.weighting dynamic is made for objective.noise_type time, not "
            f"{self.noise_type}; use surrogate",
        )
        require(
            not is_time or (self.noise_bias is None and self.noise_scale == 1.0),
            "objective.noise_type time mixes by objective.uniform_probability; remove "
            "objective.noise_bias and objective.noise_scale",
        )
        require(
            self.noise_bias is None or math.isfinite(self.noise_bias),
            f"objective.noise_bias is {self.noise_bias}; use 1000 or -1000 for all uniform or all "
            "masks",
        )
        default = self.__dataclass_fields__["noise_type"].default
        require(
            self.noise_bias is None or self.noise_type == default,
            f"objective.noise_bias {self.noise_bias} and objective.noise_type {self.noise_type} "
            "name two kinds of noise; remove one",
        )

    @property
    def attention(self) -> AttentionPattern:
        """The attention pattern this objective needs."""
        if self.kind == "autoregressive":
            return AttentionPattern.CAUSAL
        if self.kind == "block":
            return AttentionPattern.BLOCK
        is_arbitrary = self.attention_annealing_steps or self.prompt_share or self.infilling_share
        return AttentionPattern.ARBITRARY if is_arbitrary else AttentionPattern.BIDIRECTIONAL

    @property
    def needs_mask(self) -> bool:
        """Whether some inputs become the mask token."""
        return self.kind != "autoregressive" or self.input_masking_ratio > 0
