"""A causal, bidirectional or block-causal transformer for models trained by megatron_dlm.

Qwen3's layers, with options, among them experts. Padding changes nothing: `attention_mask` hides
padded slots from all others, on either side, and positions count real tokens only. Needs PyTorch
2.5 or newer. Shapes: b rows, s tokens of the input, L slots of a cache, h hidden size, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

# Every file beside this one is named here: old transformers copy no others.
from .configuration_megatron_dlm import MegatronDLMConfig
from .denoiser import NO_CACHE, Denoiser
from .experts import Router
from .layers import Layer, RMSNorm
from .rotary import rotary_frequencies, rotary_table
from .visibility import KeyValueCache, Rule


class MegatronDLMPreTrainedModel(PreTrainedModel):
    """What transformers must know."""

    config: MegatronDLMConfig
    config_class = MegatronDLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012 - read by transformers
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 - it moves by small steps

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (RMSNorm, Router)):
            module.reset()


class MegatronDLMModel(MegatronDLMPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)
        # Our own attention wants to see a causal mask, the kernels make it up.
        needs_mask = config.attention_sink or config.attn_logit_softcapping is not None
        self.rule = Rule(config.attn_mask_type, config.block_size, needs_mask)
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
        context: Tensor | None = None,
        doubled: bool = False,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states [b, s, h]; the arguments are those of `MegatronDLMForCausalLM`."""
        if cache is not None and self.config.routes_whole_rows:
            raise ValueError(NO_CACHE)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen, counted = self.rule.visibility(
            hidden,
            attention_mask=attention_mask,
            context=context,
            cache=cache,
            slots=slots,
            doubled=doubled,
        )
        config = self.config
        positions = counted if position_ids is None else position_ids
        frequencies = rotary_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling_factor
        )
        rotary = rotary_table(positions, frequencies.to(hidden.device), hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, seen)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


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

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., V] of the model's hidden states [.., h]."""
        table = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return linear(hidden * self.config.output_multiplier, table)

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
        context: Tensor | None = None,
        doubled: bool = False,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [b, s, V] of input_ids [b, s].

        attention_mask [b, s] (with a cache [b, L]): 0 is padding, on either side; no other slot
        sees it. position_ids [b, s]: by default the real tokens before a slot. With a cache the
        tokens lie at `slots` ([s] or [b, s]) of its L slots: their keys and values are written
        there, and they see all slots written so far (a causal model: not those behind them, a block
        model: not those of later blocks). context, shaped as attention_mask: slots that see each
        other alone, such as the prompt of a model trained with `prompt_attention`. doubled (block
        models): input_ids are [corrupted; clean] of [b, s / 2] each, as in training. labels [b, s]:
        -100 is not scored; scored against the logits of the same slot, or of the slot before in an
        autoregressive model.
        """
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            cache=cache,
            slots=slots,
            context=context,
            doubled=doubled,
        ).last_hidden_state
        logits = self.logits(hidden)
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
        drawn. Diffusion models take further options, the fields of `MaskedDecoding` (masked and
        block) or `HybridDecoding`; with max_new_tokens=0 they fill the masks of the prompts. The
        same seed gives the same text, whatever else is in the batch.
        """
        # They lie beside this file in an exported directory.
        from .block_samplers import sample_block
        from .hybrid_noise import HybridNoise
        from .hybrid_samplers import HybridDecoding, sample_hybrid
        from .masked_samplers import MaskedDecoding, sample_masked
        from .samplers import TokenChoice, sample_autoregressive

        config, denoiser = self.config, self.denoiser()
        end = config.eos_token_id if eos_token_id is None else eos_token_id
        silent = tuple(token for token in config.silent_token_ids if token != end)
        given: dict[str, Any] = {
            "num_tokens": max_new_tokens,
            "choice": TokenChoice(temperature if do_sample else 0.0, top_k, top_p, silent),
            "valid": None if attention_mask is None else attention_mask.bool(),
            "eos_id": end,
            "seed": seed,
        }
        kind = config.objective_kind
        if kind == "autoregressive":
            return sample_autoregressive(denoiser, input_ids, **given, **decoding).tokens
        given["mask_id"] = config.mask_token_id
        if kind == "hybrid":
            law = {"bias": config.noise_bias, "scale": config.noise_scale}
            if config.noise_type == "time":
                law = {"uniform_probability": config.uniform_probability}
            given |= {
                "noise": HybridNoise(**law),
                "vocab_size": config.vocab_size,
                "prompt_attention": config.prompt_attention,
                "decoding": HybridDecoding(**decoding),
            }
            return sample_hybrid(denoiser, input_ids, **given).tokens
        given["decoding"] = MaskedDecoding(**decoding)
        if kind == "block":
            given["block_size"] = config.block_size
            return sample_block(denoiser, input_ids, **given).tokens
        return sample_masked(denoiser, input_ids, **given).tokens
