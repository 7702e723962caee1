"""The same transformer in plain PyTorch: what our step is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_dlm.config.architecture import ModelConfig


class PlainTransformer(nn.Module):
    """RMSNorm, RoPE, QK norm, SwiGLU, scaled_dot_product_attention; no biases, one KV per head."""

    def __init__(self, config: ModelConfig, *, is_causal: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _Layer(config, is_causal=is_causal) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.normalization_epsilon)
        self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if not config.untie_embeddings_and_output_weights:
            self.head.weight = self.embedding.weight
        self.cos, self.sin = _rotary_table(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] -> logits [b, s, padded vocabulary]."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, self.cos, self.sin)
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def load_megatron(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a Megatron Core GPTModel of this shape."""
        self.embedding.weight.copy_(weights["embedding.word_embeddings.weight"])
        if "output_layer.weight" in weights:
            self.head.weight.copy_(weights["output_layer.weight"])
        self.norm.weight.copy_(weights["decoder.final_layernorm.weight"])
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            prefix = f"decoder.layers.{number}."
            layer.load_megatron(
                {
                    name.removeprefix(prefix): value
                    for name, value in weights.items()
                    if name.startswith(prefix)
                }
            )


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, is_causal: bool) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.normalization_epsilon
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.is_causal = is_causal
        self.attention_norm = nn.RMSNorm(hidden, eps=epsilon)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if config.qk_layernorm:
            self.query_norm = nn.RMSNorm(self.head_size, eps=epsilon)
            self.key_norm = nn.RMSNorm(self.head_size, eps=epsilon)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=epsilon)
        self.gate_and_up = nn.Linear(hidden, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = (batch, length, 3, self.num_heads, self.head_size)
        query, key, value = self.qkv(self.attention_norm(x)).view(heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            _rotate(self.query_norm(query), cos, sin),
            _rotate(self.key_norm(key), cos, sin),
            value,
            is_causal=self.is_causal,
        )
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)

    def load_megatron(self, weights: Mapping[str, Tensor]) -> None:
        # Megatron stores query, key and value head by head; here all queries come first.
        packed = weights["self_attention.linear_qkv.weight"]
        by_head = packed.view(self.num_heads, 3, self.head_size, -1)
        self.qkv.weight.copy_(by_head.transpose(0, 1).flatten(0, 2))
        for norm, name in ((self.query_norm, "q_layernorm"), (self.key_norm, "k_layernorm")):
            if isinstance(norm, nn.RMSNorm):
                norm.weight.copy_(weights[f"self_attention.{name}.weight"])
        self.projection.weight.copy_(weights["self_attention.linear_proj.weight"])
        self.gate_and_up.weight.copy_(weights["mlp.linear_fc1.weight"])
        self.down.weight.copy_(weights["mlp.linear_fc2.weight"])
        self.attention_norm.weight.copy_(weights["input_layernorm.weight"])
        self.mlp_norm.weight.copy_(weights["pre_mlp_layernorm.weight"])


def _rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, [s, head size]."""
    exponents = torch.arange(0, config.head_size, 2) / config.head_size
    frequencies = 1.0 / config.rotary_base**exponents
    angles = torch.outer(torch.arange(config.seq_length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
