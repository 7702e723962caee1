"""Configuration of models trained by megatron_dlm; ships beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class MegatronDLMConfig(PretrainedConfig):
    """Qwen3's keys, and what a diffusion language model adds to them.

    attn_mask_type: "bidirectional" (diffusion) or "causal" (autoregressive).
    objective_kind: what was learned; "masked" models predict the token of a slot itself,
        "autoregressive" models the next one.
    mask_token_id: the id that stands for a hidden token.
    silent_token_ids: ids that stand for no text and are never generated.
    qk_layernorm: RMSNorm on every query head and key head, before the rotary embedding.
    attention_bias: biases of the query, key and value projections (none elsewhere).
    rope_scaling_factor: stretch the rotary embedding as Llama 3.1 does; None is not at all.
    gated_mlp: down(act(gate) * up), otherwise down(act(up)).
    """

    model_type = "megatron_dlm"

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        qk_layernorm: bool = True,
        attention_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling_factor: float | None = None,
        max_position_embeddings: int = 2048,
        attn_mask_type: str = "bidirectional",
        objective_kind: str = "masked",
        mask_token_id: int | None = None,
        silent_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        **options: Any,
    ) -> None:
        rope = _pop_rope(options)
        if attn_mask_type not in ("bidirectional", "causal"):
            raise ValueError(f"attn_mask_type is {attn_mask_type!r}; use bidirectional or causal")
        super().__init__(**options)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.qk_layernorm = qk_layernorm
        self.attention_bias = attention_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = float(rope.get("rope_theta", rope_theta))
        self.rope_scaling_factor = rope.get("factor", rope_scaling_factor)
        self.max_position_embeddings = max_position_embeddings
        self.attn_mask_type = attn_mask_type
        self.objective_kind = objective_kind
        self.mask_token_id = mask_token_id
        self.silent_token_ids = list(silent_token_ids)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range

    @property
    def is_causal(self) -> bool:
        """Whether a slot sees only itself and the slots before it."""
        return self.attn_mask_type == "causal"


def _pop_rope(options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, from where transformers 5 or 4 keeps them."""
    places = [options.pop(name, None) for name in ("rope_parameters", "rope_scaling")]
    rope: dict[str, Any] = places[0] or places[1] or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not known to this model")
    return rope
