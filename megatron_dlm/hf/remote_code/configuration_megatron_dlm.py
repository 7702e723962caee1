"""Configuration of models trained by megatron_dlm; ships beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_KNOWN = {
    "attn_mask_type": ("bidirectional", "causal", "block"),
    "moe_routing": ("token_choice", "expert_choice"),
    "moe_score_function": ("softmax", "sigmoid"),
}


class MegatronDLMConfig(PretrainedConfig):
    """Qwen3's keys, and what options and diffusion add to them."""

    model_type = "megatron_dlm"

    vocab_size: int = 32000
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 0
    """0: as many as query heads."""
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    gated_mlp: bool = True
    """down(act(gate) * up), otherwise down(act(up))."""
    mlp_bias: bool = False
    attention_bias: bool = False
    """Biases of the query, key and value projections, not of the output."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys, before the rotary embedding."""
    qk_layernorm_scope: str = "head"
    """head: every head by itself; full: all heads together, a gain for each number."""
    attn_logit_softcapping: float | None = None
    """Attention scores s become c tanh(s / c)."""
    attention_sink: bool = False
    """A learned key and value per key-value head, without a position, that every query sees."""
    rms_norm_eps: float = 1e-6
    layernorm_zero_centered_gamma: bool = False
    """Weights of norms are the gain minus one."""
    residual_multiplier: float = 1.0
    """Of attention and MLP outputs."""
    output_multiplier: float = 1.0
    """Of logits."""
    rope_theta: float = 10000.0
    rope_scaling_factor: float | None = None
    """Stretch the rotary embedding as Llama 3.1 does."""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    num_experts: int = 0
    """Of the MLP of a layer; 0: no layer has experts."""
    num_dense_layers: int = 0
    """The first layers have none."""
    num_experts_per_tok: int = 2
    """expert_choice: on average."""
    moe_intermediate_size: int = 0
    """Inner width of one expert."""
    moe_routing: str = "token_choice"
    """token_choice: a token takes its best experts; expert_choice: an expert takes the best tokens
    of a row."""
    moe_score_function: str = "softmax"
    """softmax or sigmoid of the router's logits."""
    moe_pre_softmax: bool = False
    """Gates are scores over all experts; otherwise over the chosen ones."""
    moe_expert_bias: bool = False
    """A bias on the choice, not on the gates."""
    moe_count_scales: Sequence[float] = ()
    """expert_choice: factors of the routed output of a token by how many experts chose it."""
    shared_expert_intermediate_size: int = 0
    """Inner width of an expert that all tokens pass; 0: none."""
    shared_expert_gate: bool = False
    """A learned sigmoid gate scales its output."""

    attn_mask_type: str = "bidirectional"
    """A slot sees: bidirectional, all; causal, those up to itself; block, those of its own block
    of `block_size` tokens and of the blocks before."""
    objective_kind: str = "masked"
    """What was learned: masked, hybrid and block models predict the token of a slot itself,
    autoregressive models the next one."""
    block_size: int = 1
    noise_type: str | None = None
    """hybrid: name of the noise's bias; time is GIDD's mixing by uniform_probability instead."""
    noise_bias: float | None = 0.0
    noise_scale: float = 1.0
    """hybrid: noise at log-SNR l is a uniform token with probability sigmoid(scale * l + bias),
    else the mask."""
    uniform_probability: float = 0.0
    prompt_share: float = 0.0
    infilling_share: float = 0.0
    """hybrid: share of training samples with clean tokens that did not see the noisy ones, at the
    beginning or anywhere."""
    mask_token_id: int | None = None
    """Stands for a hidden token."""
    silent_token_ids: Sequence[int] = ()
    """Stand for no text and are never generated."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, **options: Any) -> None:
        rope = _pop_rope(options)
        own = {
            name: options.pop(name, getattr(MegatronDLMConfig, name))
            for name in MegatronDLMConfig.__annotations__
        }
        for name, known in _KNOWN.items():
            if own[name] not in known:
                raise ValueError(f"{name} is {own[name]!r}; use {', '.join(known)}")
        if own["num_experts"] and own["mlp_bias"]:
            raise ValueError("mlp_bias is true, but experts have no biases")
        if own["moe_routing"] == "expert_choice" and own["attn_mask_type"] != "bidirectional":
            raise ValueError(
                f"moe_routing expert_choice looks at whole rows, but attn_mask_type "
                f"{own['attn_mask_type']} must not see what follows"
            )
        super().__init__(**options)
        for name, value in own.items():
            setattr(self, name, value)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_theta = float(rope.get("rope_theta", self.rope_theta))
        self.rope_scaling_factor = rope.get("factor", self.rope_scaling_factor)
        self.silent_token_ids = list(self.silent_token_ids)
        self.moe_count_scales = list(self.moe_count_scales)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a set of experts."""
        return self.num_experts > 0 and layer >= self.num_dense_layers

    @property
    def routes_whole_rows(self) -> bool:
        """Whether what a token passes depends on all tokens of its row, so that no part of a row
        can be computed alone."""
        return self.num_experts > 0 and self.moe_routing == "expert_choice"

    @property
    def is_causal(self) -> bool:
        """Whether a slot sees only itself and the slots before it."""
        return self.attn_mask_type == "causal"

    @property
    def prompt_attention(self) -> bool:
        """Whether the model was trained with clean tokens that see no noisy ones."""
        return self.prompt_share > 0 or self.infilling_share > 0


def _pop_rope(options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, from where transformers 5 or 4 keeps them."""
    places = [options.pop(name, None) for name in ("rope_parameters", "rope_scaling")]
    rope: dict[str, Any] = places[0] or places[1] or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not known to this model")
    return rope
