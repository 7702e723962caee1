"""FLOPs as the papers count them, side by side, and what generating text costs.

A multiply-add counts two. Conventions differ by the output layer, by attention and by what a
parameter is; a law fitted under one of them must be read under the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.models.accounting import (
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of training on one token."""

    six_n: float
    """6N: N all parameters that a token meets, embeddings included (Quokka, Hoffmann et al.
    2022; the N of Kaplan et al. 2020 is without them)."""
    six_p_and_attention: float
    """6P + 12 L a S: P without embeddings, attention over all S keys ("Scaling Behavior of Discrete
    Diffusion Language Models" section 4; a is the width of all heads)."""
    fine: float
    """Every matrix product as computed: the output layer on scored slots, attention on the keys
    that the pattern shows."""


def training_flops(model: ModelConfig, objective: ObjectiveConfig) -> TrainingFlops:
    """Per token of a sample, under each convention."""
    parameters = count_parameters(model)
    tables = parameters.embedding + parameters.output_layer
    attention_width = model.num_attention_heads * model.head_size
    return TrainingFlops(
        six_n=6.0 * parameters.active,
        six_p_and_attention=6.0 * (parameters.active - tables)
        + 12.0 * model.num_layers * attention_width * model.seq_length,
        fine=training_flops_per_token(model, objective).total,
    )


def table_facts(model: ModelConfig, objective: ObjectiveConfig) -> dict[str, float]:
    """What a tidy table says of a run beside the facts of run.json, whose FLOPs are the fine count.

    num_parameters_without_embeddings: of those that a token meets.
    """
    parameters, flops = count_parameters(model), training_flops(model, objective)
    return {
        "num_parameters_without_embeddings": parameters.active
        - parameters.embedding
        - parameters.output_layer,
        "flops_per_token_six_n": flops.six_n,
        "flops_per_token_six_p_and_attention": flops.six_p_and_attention,
    }


@dataclass(frozen=True)
class GenerationFlops:
    """FLOPs of generating one text."""

    autoregressive: float
    """With a cache of keys and values: every token is computed once."""
    diffusion: float
    """Without any cache: every step computes all slots, prompt included."""

    @property
    def ratio(self) -> float:
        """Diffusion over autoregressive."""
        return self.diffusion / self.autoregressive


def generation_flops(
    model: ModelConfig, *, new_tokens: int, prompt_tokens: int = 0, num_steps: int | None = None
) -> GenerationFlops:
    """Both ways to write `new_tokens` after a prompt; num_steps: one per new token by default.

    With as many steps as tokens and no prompt the ratio is that of the table in the README of
    "Diffusion Language Models are Super Data Learners": 16 times for 16 tokens up to 4,700 times
    for 4,096 (1B model). The output layer runs on the slot that is read (autoregressive), or on all
    new slots (diffusion). Caches and fewer steps, which docs/generation.md has, lower it.
    """
    steps = new_tokens if num_steps is None else num_steps
    length = prompt_tokens + new_tokens
    per_slot = forward_flops_per_token(model, ObjectiveConfig(kind="autoregressive")).linear
    output = 2.0 * model.padded_vocab_size * model.hidden_size
    # Queries times keys, and weights times values.
    per_pair = 4.0 * model.num_layers * model.num_attention_heads * model.head_size
    seen = length * (length + 1) / 2
    return GenerationFlops(
        autoregressive=per_slot * length + per_pair * seen + output * new_tokens,
        diffusion=steps * (per_slot * length + per_pair * length**2 + output * new_tokens),
    )
