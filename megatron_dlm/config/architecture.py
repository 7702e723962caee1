"""The section that says what is built: model.

Attribute docstrings are the `--help` text. The section checks its own fields; rules that span
sections live in `config/validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive
from megatron_dlm.config.moe import WEIGHT_FIELDS as MOE_WEIGHT_FIELDS
from megatron_dlm.config.moe import MoEConfig

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
MegatronOption = bool | int | float | str | None


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
    mlp_bias: bool = False
    """Biases in the MLP; attention has none (model.megatron.add_qkv_bias gives it some)."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys."""
    qk_layernorm_scope: Literal["head", "full"] = "head"
    """head: every head is normalised by itself, with one gain for all; full: all heads together,
    with a gain for each number."""
    attn_logit_softcapping: float | None = None
    """Attention scores s become c * tanh(s / c) with this c; default: they stay as they are."""
    attention_sink: bool = False
    """One more key and value per key-value head, learned and without a position, always visible."""
    normalization_epsilon: float = 1e-6
    """Epsilon of all RMSNorms."""
    layernorm_zero_centered_gamma: bool = False
    """RMSNorms multiply by 1 + gain, and the gain begins at 0."""
    residual_multiplier: float = 1.0
    """Attention and MLP outputs are multiplied by this before they join the residual stream."""
    output_multiplier: float = 1.0
    """Logits are multiplied by this."""
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
    output_init_std: float | None = None
    """Standard deviation of the initial output layer, 0 for zeros; default: init_method_std. Needs
    untie_embeddings_and_output_weights."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it is installed with a GPU."""
    attention_backend: Literal["auto", "fused", "flash", "unfused", "local"] = "auto"
    """Kernel of attention: cuDNN's (fused), flash-attn's, or a slow one without memory savings
    (unfused), all by Transformer Engine; our own (local); auto: the engine's choice where it has
    one. Soft caps, sinks, blocks and arbitrary masks always take ours."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, selective (recompute_modules), or full (whole layers)."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    """Parts of each layer that recompute_granularity selective runs again in the backward pass:
    core_attn, mlp, moe, shared_experts; with Transformer Engine also layernorm and moe_act."""
    recompute_num_layers: int = 1
    """Layers per recomputed unit when recompute_granularity is full."""
    moe: MoEConfig = field(default_factory=MoEConfig)
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
                "residual_multiplier": self.residual_multiplier,
                "output_multiplier": self.output_multiplier,
                "recompute_num_layers": self.recompute_num_layers,
            },
        )
        optional = ("num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size")
        for name in (*optional, "attn_logit_softcapping"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} is {value}; it must be positive")
        factor = self.rope_scaling_factor
        require(
            factor is None or factor >= 1,
            f"model.rope_scaling_factor is {factor}; it must be at least 1",
        )
        self._check_heads()
        self._check_output()
        self._check_recompute()
        require(
            self.moe.num_dense_layers < self.num_layers,
            f"model.moe.num_dense_layers {self.moe.num_dense_layers} leaves none of the "
            f"{self.num_layers} layers (model.num_layers) with experts",
        )
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
        require(
            self.qk_layernorm or self.qk_layernorm_scope == "head",
            f"model.qk_layernorm_scope {self.qk_layernorm_scope} has no meaning with "
            "model.qk_layernorm false; remove it",
        )

    def _check_output(self) -> None:
        std = self.output_init_std
        require(std is None or std >= 0, f"model.output_init_std is {std}; it must be at least 0")
        require(
            std is None or self.untie_embeddings_and_output_weights,
            f"model.output_init_std is {std}, but the output layer is the embedding; set "
            "model.untie_embeddings_and_output_weights true",
        )

    def _check_recompute(self) -> None:
        if self.recompute_granularity != "selective":
            return
        require(
            bool(self.recompute_modules),
            "model.recompute_modules is empty; name a module or use model.recompute_granularity "
            "none",
        )
        for_experts = {"moe", "moe_act", "shared_experts"} & set(self.recompute_modules)
        require(
            not for_experts or self.moe.is_moe,
            f"model.recompute_modules names {', '.join(sorted(for_experts))}, but the model has no "
            "experts (model.moe.num_experts 0)",
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
    def expert_ffn_size(self) -> int:
        """Inner width of one expert."""
        return self.moe.ffn_hidden_size or self.ffn_size

    @property
    def num_moe_layers(self) -> int:
        """Layers whose MLP is a set of experts: the last ones."""
        return self.num_layers - self.moe.num_dense_layers if self.moe.is_moe else 0

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows: vocab_size rounded up, independent of the layout."""
        assert self.vocab_size is not None, "resolve() fills vocab_size"
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


_WEIGHT_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "activation",
    "mlp_bias",
    "qk_layernorm",
    "qk_layernorm_scope",
    "attn_logit_softcapping",
    "attention_sink",
    "normalization_epsilon",
    "layernorm_zero_centered_gamma",
    "residual_multiplier",
    "output_multiplier",
    "rotary_base",
    "rope_scaling_factor",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "untie_embeddings_and_output_weights",
)


def weight_settings(model: ModelConfig) -> dict[str, Any]:
    """The part of ModelConfig that says what the weights are, by dotted name; the rest is how they
    are used."""
    settings = {name: getattr(model, name) for name in _WEIGHT_FIELDS}
    settings.update({f"moe.{name}": getattr(model.moe, name) for name in MOE_WEIGHT_FIELDS})
    return settings
