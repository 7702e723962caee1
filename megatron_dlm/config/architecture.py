"""Sections that say what is trained and how it is split: model, objective, parallel.

Attribute docstrings are the `--help` text. Each section checks its own fields; rules that span
sections live in `config/validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive

MegatronOption = bool | int | float | str | None


class AttentionPattern(Enum):
    """Which keys a query may see."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer; the same for every objective."""

    num_layers: int = 4
    """Number of transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Number of query heads; hidden_size must be a multiple of it unless kv_channels is given."""
    num_query_groups: int | None = None
    """Number of key-value heads (grouped-query attention); default: one per query head."""
    kv_channels: int | None = None
    """Width of one attention head; default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; default: 4 * hidden_size; swiglu: 8/3 of it rounded up to 64."""
    activation: Literal["swiglu", "squared_relu", "gelu"] = "swiglu"
    """MLP non-linearity."""
    qk_layernorm: bool = True
    """RMSNorm on every query head and key head."""
    normalization_epsilon: float = 1e-6
    """Epsilon of all RMSNorms."""
    rotary_base: int = 10_000
    """Base period of the rotary position embedding."""
    rope_scaling_factor: float | None = None
    """Stretch the rotary embedding by this factor as Llama 3.1 does, from 8192 positions on."""
    seq_length: int = 128
    """Tokens in one sample."""
    vocab_size: int | None = None
    """Rows of the vocabulary, special tokens included; default: read from the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """Rows are padded to a multiple of this on every layout; padding has probability 0."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weights."""
    hidden_dropout: float = 0.0
    """Dropout probability of the residual branches and the embedding."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; residual outputs get std / sqrt(2 * num_layers)."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it is installed with a GPU."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, selective (core attention), or full (whole layers)."""
    recompute_num_layers: int = 1
    """Layers per recomputed unit when recompute_granularity is full."""
    megatron: dict[str, MegatronOption] = field(default_factory=dict)
    """Further fields of Megatron Core's TransformerConfig, checked against it by name."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            {
                "num_layers": self.num_layers,
                "hidden_size": self.hidden_size,
                "num_attention_heads": self.num_attention_heads,
                "seq_length": self.seq_length,
                "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
                "init_method_std": self.init_method_std,
                "rotary_base": self.rotary_base,
                "recompute_num_layers": self.recompute_num_layers,
            },
        )
        for name in ("num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} is {value}; it must be positive")
        factor = self.rope_scaling_factor
        require(
            factor is None or factor >= 1,
            f"model.rope_scaling_factor is {factor}; it must be at least 1",
        )
        self._check_heads()
        dropouts = {
            "hidden_dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
        }
        require_fraction("model", dropouts, below_one=True)

    def _check_heads(self) -> None:
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size {self.hidden_size} is not a multiple of "
            f"model.num_attention_heads {self.num_attention_heads}",
        )
        source = "model.hidden_size / model.num_attention_heads"
        require(
            self.head_size % 2 == 0,
            f"{'model.kv_channels' if self.kv_channels else source} is {self.head_size}; "
            "rotary embeddings need it even",
        )
        require(
            self.num_attention_heads % self.query_groups == 0,
            f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"model.num_query_groups {self.query_groups}",
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows: vocab_size rounded up, independent of the layout."""
        assert self.vocab_size is not None, "resolve() fills vocab_size"
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


WEIGHT_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "activation",
    "qk_layernorm",
    "normalization_epsilon",
    "rotary_base",
    "rope_scaling_factor",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "untie_embeddings_and_output_weights",
)
"""The part of ModelConfig that says what the weights are; the rest is how they are used."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned. Fields of another kind must keep their defaults."""

    kind: Literal["autoregressive", "masked"] = "masked"
    """autoregressive: next-token prediction; masked: masked (absorbing) diffusion."""
    input_masking_ratio: float = 0.0
    """autoregressive: share of training inputs replaced by the mask; targets stay clean."""
    schedule: Literal["linear", "cosine", "polynomial"] = "linear"
    """masked: alpha(t), the share of tokens still clean at time t."""
    schedule_exponent: float = 2.0
    """masked: w of the polynomial schedule alpha(t) = 1 - t^w."""
    weighting: Literal["elbo", "count", "unweighted", "maskgit"] = "elbo"
    """masked: trained weight. elbo and count are the bound, unweighted and maskgit are not."""
    time_sampling: Literal["stratified", "iid"] = "stratified"
    """masked: noise times spread evenly over the global batch, or independent per sample."""
    time_floor: float = 1e-3
    """masked: smallest noise time t; keeps the weight 1/t finite."""
    variable_length_probability: float = 0.0
    """masked: share of training steps whose samples are cropped to one random length."""
    variable_length_multiple: int = 16
    """masked: cropped lengths are multiples of this, whatever the layout (SP and FP8 need one)."""
    mask_token_id: int | None = None
    """Id of the mask token; default: read from the tokenizer."""

    def __post_init__(self) -> None:
        require_fraction(
            "objective",
            {
                "input_masking_ratio": self.input_masking_ratio,
                "variable_length_probability": self.variable_length_probability,
            },
        )
        require(
            self.input_masking_ratio <= 0.9,
            f"objective.input_masking_ratio is {self.input_masking_ratio}; it must be at most 0.9",
        )
        require(
            0 < self.time_floor < 1,
            f"objective.time_floor is {self.time_floor}; it must lie in (0, 1)",
        )
        require(
            self.schedule_exponent > 0,
            f"objective.schedule_exponent is {self.schedule_exponent}; it must be greater than 0",
        )
        require_positive("objective", {"variable_length_multiple": self.variable_length_multiple})
        require(
            self.weighting != "count" or self.schedule == "linear",
            f"objective.weighting count draws the number of masks uniformly, which is the linear "
            f"schedule; objective.schedule is {self.schedule}",
        )
        self._refuse_foreign_fields()

    def _refuse_foreign_fields(self) -> None:
        masked_only = (
            "schedule",
            "schedule_exponent",
            "weighting",
            "time_sampling",
            "time_floor",
            "variable_length_probability",
            "variable_length_multiple",
        )
        foreign = {"autoregressive": masked_only, "masked": ("input_masking_ratio",)}[self.kind]
        for name in foreign:
            default = self.__dataclass_fields__[name].default
            require(
                getattr(self, name) == default,
                f"objective.{name} has no meaning for objective.kind {self.kind}; remove it",
            )

    @property
    def attention(self) -> AttentionPattern:
        """The attention pattern this objective needs."""
        if self.kind == "autoregressive":
            return AttentionPattern.CAUSAL
        return AttentionPattern.BIDIRECTIONAL


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are split over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule, VPP); needs PP > 1."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of an MoE layer (EP)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the TP ranks (SP); needs TP > 1."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over DP ranks while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters over DP ranks while the forward pass runs; needs overlap_grad_reduce."""
    distributed_timeout_minutes: float = 10.0
    """Minutes before a collective without answer ends the run."""

    def __post_init__(self) -> None:
        require_positive(
            "parallel",
            {
                "tensor_model_parallel_size": self.tensor_model_parallel_size,
                "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
                "context_parallel_size": self.context_parallel_size,
                "expert_model_parallel_size": self.expert_model_parallel_size,
                "distributed_timeout_minutes": self.distributed_timeout_minutes,
            },
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1",
        )
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or (virtual > 1 and self.pipeline_model_parallel_size > 1),
            f"parallel.virtual_pipeline_model_parallel_size is {virtual}; it must be at least 2 "
            "and needs parallel.pipeline_model_parallel_size > 1",
        )
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce",
        )
        require(
            self.context_parallel_size == 1,
            f"parallel.context_parallel_size is {self.context_parallel_size}; context parallelism "
            "is not available yet, use 1",
        )
        require(
            self.expert_model_parallel_size == 1,
            f"parallel.expert_model_parallel_size is {self.expert_model_parallel_size}; it needs "
            "MoE layers, which are not available yet, use 1",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model (TP * PP * CP)."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
