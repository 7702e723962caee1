"""A causal or bidirectional transformer with Qwen3's layers, for models trained by megatron_dlm.

Padding changes nothing: `attention_mask` hides padded slots from all others, on either side, and
positions count real tokens only. Needs PyTorch 2.5 or newer. Shapes: b rows, s tokens of the input,
L slots of a cache, h hidden size, d width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_megatron_dlm import MegatronDLMConfig


class KeyValueCache:
    """Keys and values of `num_slots` slots, each written and rewritten at its place.

    One buffer serves appending (autoregressive decoding) and rewriting the block that is being
    denoised while what lies left (and right) of it stays.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.filled: Tensor | None = None
        """bool [b, L]: slots that hold a real token, the only ones that attention may see."""
        self._num_used = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def mark(self, slots: Tensor, real: Tensor) -> Tensor:
        """Note what is about to be written at slots [b, s]; returns `filled` up to the last."""
        if self.filled is None:
            self.filled = real.new_zeros(len(real), self.num_slots)
        self.filled.scatter_(1, slots, real)
        self._num_used = max(self._num_used, int(slots.max()) + 1)
        return self.filled[:, : self._num_used]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [b, heads, s, d] at slots [b, s]; returns all slots up to the last, [.., L, d]."""
        if layer not in self._layers:
            rows, heads, _, width = key.shape
            empty = key.new_zeros(rows, heads, self.num_slots, width)
            self._layers[layer] = (empty, empty.clone())
        place = slots[:, None, :, None].expand_as(key)
        for stored, new in zip(self._layers[layer], (key, value), strict=True):
            stored.scatter_(2, place, new)
        keys, values = self._layers[layer]
        return keys[:, :, : self._num_used], values[:, :, : self._num_used]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: MegatronDLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        hidden, bias = config.hidden_size, config.attention_bias
        query_width, key_width = (count * config.head_dim for count in self.heads)
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=False)
        size, eps, normed = config.head_dim, config.rms_norm_eps, config.qk_layernorm
        self.q_norm = RMSNorm(size, eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(size, eps) if normed else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: _Seen) -> Tensor:
        query_heads, key_heads = self.heads
        query = rotate(self.q_norm(_split(self.q_proj(x), query_heads)), *rotary)
        key = rotate(self.k_norm(_split(self.k_proj(x), key_heads)), *rotary)
        value = _split(self.v_proj(x), key_heads)
        if seen.cache is not None and seen.slots is not None:
            key, value = seen.cache.write(self.layer, seen.slots, key, value)
        if query_heads != key_heads and seen.mask is not None:
            # The fast kernels take a mask or grouped queries, not both.
            key, value = (
                part.repeat_interleave(query_heads // key_heads, 1) for part in (key, value)
            )
        grouped = query.shape[1] != key.shape[1]
        mixed = scaled_dot_product_attention(
            query, key, value, seen.mask, is_causal=seen.is_causal, enable_gqa=grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(gate) * up), or down(act(up)) without a gate."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: MegatronDLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: _Seen) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Seen:
    """Which slots the queries see, and where their keys are stored."""

    def __init__(self, mask: Tensor | None, *, is_causal: bool) -> None:
        self.mask = mask
        """bool [b, 1, s, s or L]; None where every slot is seen, or all up to the own one."""
        self.is_causal = is_causal
        self.cache: KeyValueCache | None = None
        self.slots: Tensor | None = None


class MegatronDLMPreTrainedModel(PreTrainedModel):
    """What transformers must know."""

    config: MegatronDLMConfig
    config_class = MegatronDLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012 - read by transformers
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class MegatronDLMModel(MegatronDLMPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        slots: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states [b, s, h]; the arguments are those of `MegatronDLMForCausalLM`."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen, counted = self._seen(hidden, attention_mask, cache, slots)
        positions = counted if position_ids is None else position_ids
        frequencies = rotary_frequencies(self.config).to(hidden.device)
        rotary = rotary_table(positions, frequencies, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, seen)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))

    def _seen(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        cache: KeyValueCache | None,
        slots: Tensor | None,
    ) -> tuple[_Seen, Tensor]:
        """What is seen from where, and positions [b, s]: real tokens before a slot."""
        rows, length, _ = hidden.shape
        causal = self.config.is_causal
        own = torch.arange(length, device=hidden.device)
        if cache is None and attention_mask is None:
            return _Seen(None, is_causal=causal), own.expand(rows, length)
        total = length if cache is None else cache.num_slots
        if attention_mask is None:
            real = torch.ones(rows, total, dtype=torch.bool, device=hidden.device)
        elif attention_mask.shape == (rows, total):
            real = attention_mask.to(device=hidden.device, dtype=torch.bool)
        else:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it must be {[rows, total]}"
            )
        slots = (own if slots is None else slots).to(hidden.device).expand(rows, length)
        counted = (real.cumsum(1) - 1).clamp(min=0).gather(1, slots)
        visible = real if cache is None else cache.mark(slots, real.gather(1, slots))
        visible = visible & real[:, : visible.shape[1]]
        place = torch.arange(visible.shape[1], device=hidden.device)
        mask = visible[:, None, :].expand(rows, length, -1)
        if causal:
            mask = mask & (place <= slots[:, :, None])
        mask = mask | (place == slots[:, :, None])  # padding sees itself, or it would see nothing
        # Where nothing is hidden the kernels are faster without a mask.
        seen = _Seen(None if bool(mask.all()) else mask[:, None], is_causal=False)
        seen.cache, seen.slots = cache, slots
        return seen, counted


class MegatronDLMForCausalLM(MegatronDLMPreTrainedModel):
    """Tokens to logits: of a slot's own token (diffusion), or of the next one (autoregressive)."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__(config)
        self.model = MegatronDLMModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        slots: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [b, s, V] of input_ids [b, s].

        attention_mask [b, s] (with a cache [b, L]): 0 is padding, on either side; no other slot
        sees it. position_ids [b, s]: by default the real tokens before a slot. With a cache the
        tokens lie at `slots` ([s] or [b, s]) of its L slots: their keys and values are written
        there, and they see all slots written so far (a causal model: not those behind them).
        labels [b, s]: -100 is not scored; scored against the logits of the same slot, or of the
        slot before in an autoregressive model.
        """
        hidden = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cache=cache, slots=slots
        ).last_hidden_state
        table = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = linear(hidden, table)
        loss = None
        if labels is not None:
            shift = 1 if self.config.is_causal else 0
            scored = logits[:, : logits.shape[1] - shift].flatten(0, 1).float()
            loss = cross_entropy(scored, labels[:, shift:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def denoiser(self) -> Denoiser:
        """The model as samplers see it."""
        return Denoiser(self)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        **decoding: Any,
    ) -> Tensor:
        """Prompts int64 [b, P] (shorter ones padded on the left) and what follows: [b, P + new].

        do_sample=False takes the likeliest tokens. A row ends with eos_token_id (default: the
        configuration's) and holds nothing else behind it; ids that stand for no text are never
        drawn. Diffusion models take the fields of `MaskedDecoding` besides: order, num_steps,
        block_size, threshold, guidance, cache; with max_new_tokens=0 they fill the masks of the
        prompts. The same seed gives the same text, whatever else is in the batch.
        """
        # They lie beside this file in an exported directory.
        from .masked_samplers import MaskedDecoding, sample_masked
        from .samplers import TokenChoice, sample_autoregressive

        end = self.config.eos_token_id if eos_token_id is None else eos_token_id
        silent = tuple(token for token in self.config.silent_token_ids if token != end)
        choice = TokenChoice(temperature if do_sample else 0.0, top_k, top_p, silent)
        given = {
            "num_tokens": max_new_tokens,
            "choice": choice,
            "valid": None if attention_mask is None else attention_mask.bool(),
            "eos_id": end,
            "seed": seed,
        }
        if self.config.objective_kind == "autoregressive":
            return sample_autoregressive(self.denoiser(), input_ids, **given, **decoding).tokens
        settings = MaskedDecoding(**decoding)
        mask = self.config.mask_token_id
        return sample_masked(
            self.denoiser(), input_ids, mask_id=mask, decoding=settings, **given
        ).tokens


class Denoiser:
    """`denoiser(tokens)` -> logits, on the model's device and without gradients."""

    def __init__(self, model: MegatronDLMForCausalLM) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        slots: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """int64 [b, s] -> [b, s, V]; valid: bool [b, s], with a cache [b, L]."""
        tokens = tokens.to(self.model.device)
        return self.model(tokens, valid, cache=cache, slots=slots).logits

    def new_cache(self, batch_size: int, num_slots: int) -> KeyValueCache:
        """An empty cache; its storage is made when it is first written."""
        del batch_size
        return KeyValueCache(num_slots)


def rotary_frequencies(config: MegatronDLMConfig) -> Tensor:
    """float32 [d / 2] radians per position; stretched where a wave is longer than 2048 positions,
    fully from 8192 on, if the configuration says so (Llama 3.1)."""
    width = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (
        torch.arange(0, width, 2, dtype=torch.float32) / width
    )
    if config.rope_scaling_factor is None:
        return frequencies
    num_waves = 8192 * frequencies / (2 * math.pi)
    kept = ((num_waves - 1) / (4 - 1)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def rotary_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, s, d] of positions [b, s]; angles in float32."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [b, heads, s, d] against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _split(x: Tensor, heads: int) -> Tensor:
    """[b, s, heads * d] -> [b, heads, s, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
