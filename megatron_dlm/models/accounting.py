"""Parameters and FLOPs of a model, counted from its configuration alone; imports no torch.

What a rank holds in memory is reckoned in accounting_memory.py.
Legend: S sequence length, h hidden size, a heads * head size, k key-value heads * head size,
f MLP width, V padded vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trainable numbers of the whole model; a tied embedding counts once."""

    embedding: int
    layers: int
    final_norm: int
    output_layer: int
    idle_experts: int = 0
    """Numbers of the layers that one token does not meet: experts beyond router_topk."""

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.output_layer

    @property
    def active(self) -> int:
        """What one token meets (expert choice: on average); of a dense model all of it."""
        return self.total - self.idle_experts

    @property
    def non_embedding(self) -> int:
        """Without the embedding and the output layer."""
        return self.layers + self.final_norm


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token of one sample; a multiply-add counts two."""

    linear: float
    """Projections and MLP of all layers."""
    attention: float
    """Queries times keys and weights times values."""
    output_layer: float
    """Hidden states times vocabulary, on scored slots only."""

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.output_layer


def attention_matrices(model: ModelConfig) -> int:
    """Weights of query, key, value and output of one layer; tensor parallelism splits them."""
    attention_width, key_value_width = widths(model)
    return model.hidden_size * (2 * attention_width + 2 * key_value_width)


def mlp_matrices(model: ModelConfig, inner_size: int) -> int:
    """Weights of one MLP, dense, expert or shared, of this inner width."""
    return (3 if model.activation == "swiglu" else 2) * model.hidden_size * inner_size


def attention_vectors_split(model: ModelConfig) -> int:
    """Other numbers of one attention that tensor parallelism splits: biases, sinks, wide norms."""
    attention_width, key_value_width = widths(model)
    numbers = 0
    if model.megatron.get("add_qkv_bias"):
        numbers += attention_width + 2 * key_value_width
    if model.qk_layernorm and model.qk_layernorm_scope == "full":
        numbers += attention_width + key_value_width
    if model.attention_sink:
        numbers += 2 * key_value_width
    return numbers


def inner_bias(model: ModelConfig, inner_size: int) -> int:
    """Bias in front of the activation of one MLP; it is split with the MLP."""
    if not model.mlp_bias:
        return 0
    return inner_size * (2 if model.activation == "swiglu" else 1)


def outer_bias(model: ModelConfig) -> int:
    """Bias behind one MLP; ranks that share the MLP hold it whole."""
    return model.hidden_size if model.mlp_bias else 0


def norm_gains(model: ModelConfig) -> int:
    """Gains of the norms of one layer that every TP rank holds whole."""
    norms = 2 * model.hidden_size
    if model.qk_layernorm and model.qk_layernorm_scope == "head":
        norms += 2 * model.head_size
    return norms


def expert_parameters(model: ModelConfig) -> int:
    """Numbers of one expert; it has no biases."""
    return mlp_matrices(model, model.expert_ffn_size)


def shared_expert_matrices(model: ModelConfig) -> int:
    """Weights of the expert that every token meets; tensor parallelism splits them."""
    return mlp_matrices(model, model.moe.shared_expert_ffn_hidden_size)


def router_parameters(model: ModelConfig) -> int:
    """Scores of one layer's experts, and the gate of the shared one; every rank holds them."""
    width, moe = model.hidden_size, model.moe
    return width * (moe.num_experts + (1 if moe.shared_expert_gate else 0))


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Trainable numbers of the model; rows that only pad the vocabulary are included."""
    embedding = model.padded_vocab_size * model.hidden_size
    inner, num_moe = model.ffn_size, model.num_moe_layers
    attention = attention_matrices(model) + attention_vectors_split(model) + norm_gains(model)
    mlp = mlp_matrices(model, inner) + inner_bias(model, inner) + outer_bias(model)
    expert = expert_parameters(model)
    moe = router_parameters(model) + shared_expert_matrices(model) + model.moe.num_experts * expert
    num_dense = model.num_layers - num_moe
    return ParameterCount(
        embedding=embedding,
        layers=model.num_layers * attention + num_dense * mlp + num_moe * moe,
        final_norm=model.hidden_size,
        output_layer=embedding if model.untie_embeddings_and_output_weights else 0,
        idle_experts=num_moe * (model.moe.num_experts - model.moe.router_topk) * expert,
    )


def mean_scored_share(objective: ObjectiveConfig) -> float:
    """Expected share of a sample's slots that reach the output layer.

    Autoregressive: all. Masked: the mean mask rate. Block: the same between the rates it trains on.
    Hybrid: noise that is all mask scores the masks, half of the slots, any other noise all slots;
    prompts and the given tokens of infilling, on average half of a sample, are never scored.
    """
    if objective.kind == "autoregressive":
        return 1.0
    if objective.kind == "hybrid":
        noised = 0.5 if _is_all_mask(objective) else 1.0
        return noised * (1 - min(objective.prompt_share + objective.infilling_share, 1.0) / 2)
    low, high = objective.lowest_mask_rate, objective.highest_mask_rate
    if objective.weighting == "count":  # one mask or more, and as many as tokens at most
        floor = 1 / (2 * objective.block_size) if objective.kind == "block" else 0.0
        return min((low + high) / 2 + floor, 1.0)
    return _mean_mask_rate(objective, low, high)


def _mean_mask_rate(objective: ObjectiveConfig, low: float, high: float) -> float:
    """Over times spread evenly between those of two mask rates."""
    if objective.schedule == "linear":
        return (low + high) / 2
    if objective.schedule == "cosine":  # mask rate sin(pi/2 t)
        first, last = (math.asin(rate) for rate in (low, high))
        return (math.cos(first) - math.cos(last)) / (last - first)
    exponent = objective.schedule_exponent  # mask rate t^w
    first, last = (rate ** (1 / exponent) for rate in (low, high))
    integral = (last ** (exponent + 1) - first ** (exponent + 1)) / (exponent + 1)
    return integral / (last - first)


def _is_all_mask(objective: ObjectiveConfig) -> bool:
    if objective.noise_type == "time":
        return objective.uniform_probability == 0
    if objective.noise_bias is not None:
        return objective.noise_bias < -200  # uniform noise is then less than fp32 can tell from 0
    return objective.noise_type == "masked"


def slots_per_token(objective: ObjectiveConfig) -> int:
    """Slots the model sees for each token of a sample: 2 for [noisy; clean]."""
    return 2 if objective.attention is AttentionPattern.BLOCK else 1


def visible_keys_per_token(model: ModelConfig, objective: ObjectiveConfig) -> float:
    """Keys that the queries of one token of a sample see, on average over the sample.

    S where attention is bidirectional (a mask hides less than the kernels skip), (S + 1) / 2 where
    it is causal. Blocks: both queries of a token see as many keys as there are tokens up to the end
    of its block. A sink is one more key for every query.
    """
    length = model.seq_length
    visible = float(length)
    if objective.attention is AttentionPattern.CAUSAL:
        visible = (length + 1) / 2
    elif objective.attention is AttentionPattern.BLOCK:
        block = objective.block_size
        ends = [min(start + block, length) for start in range(0, length, block)]
        pairs = sum((end - start) * end for start, end in pairwise([0, *ends]))
        visible = 2 * pairs / length
    return visible + (slots_per_token(objective) if model.attention_sink else 0)


def forward_flops_per_token(model: ModelConfig, objective: ObjectiveConfig) -> FlopCount:
    """Matrix products of one forward pass, per token of a sample.

    Attention is counted as computed by a kernel that skips what the pattern hides, see
    `visible_keys_per_token`: bidirectional attention costs twice the causal. Blocks run every token
    twice, noisy and clean. Experts: router_topk of them per token, as if none dropped a token and
    none was padded. Norms, activations and softmax are not counted.
    """
    attention_width, _ = widths(model)
    output_rows = model.padded_vocab_size * model.hidden_size
    visible_keys = visible_keys_per_token(model, objective)
    return FlopCount(
        linear=2.0 * _active_matrices(model) * slots_per_token(objective),
        attention=4.0 * model.num_layers * attention_width * visible_keys,
        output_layer=2.0 * output_rows * mean_scored_share(objective),
    )


def training_flops_per_token(model: ModelConfig, objective: ObjectiveConfig) -> FlopCount:
    """Forward and backward pass: three times the forward pass; no recomputation counted."""
    forward = forward_flops_per_token(model, objective)
    return FlopCount(3 * forward.linear, 3 * forward.attention, 3 * forward.output_layer)


def widths(model: ModelConfig) -> tuple[int, int]:
    """(query width, key width = value width)."""
    return model.num_attention_heads * model.head_size, model.query_groups * model.head_size


def _active_matrices(model: ModelConfig) -> int:
    """Weights of all layers that one token is multiplied with."""
    moe, num_moe = model.moe, model.num_moe_layers
    dense = mlp_matrices(model, model.ffn_size)
    routed = moe.router_topk * mlp_matrices(model, model.expert_ffn_size)
    layers = model.num_layers * attention_matrices(model) + (model.num_layers - num_moe) * dense
    return layers + num_moe * (routed + router_parameters(model) + shared_expert_matrices(model))
