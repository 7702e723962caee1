"""Parameters, FLOPs and memory of a model, counted from its configuration alone; imports no torch.

Legend: S sequence length, h hidden size, a heads * head size, k key-value heads * head size,
f MLP width, V padded vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trainable numbers of the whole model; a tied embedding counts once."""

    embedding: int
    layers: int
    final_norm: int
    output_layer: int

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.output_layer

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class BatchLayout:
    """What the memory of a rank depends on besides model and parallel sizes."""

    micro_batch_size: int
    num_micro_batches: int
    data_parallel_size: int
    precision: str
    loss_chunk_slots: int | None = None
    """Scored slots whose logits exist at once; None is those of a whole micro-batch."""


def layer_matrices(model: ModelConfig) -> int:
    """Weights of one layer that tensor parallelism splits: query, key, value, output, MLP."""
    attention_width, key_value_width = _widths(model)
    attention = model.hidden_size * (2 * attention_width + 2 * key_value_width)
    num_mlp_matrices = 3 if model.activation == "swiglu" else 2
    return attention + num_mlp_matrices * model.hidden_size * model.ffn_size


def layer_vectors_split(model: ModelConfig) -> int:
    """Other numbers of one layer that tensor parallelism splits: biases, sinks, wide norms."""
    attention_width, key_value_width = _widths(model)
    numbers = 0
    if model.mlp_bias:
        numbers += model.ffn_size * (2 if model.activation == "swiglu" else 1)
    if model.megatron.get("add_qkv_bias"):
        numbers += attention_width + 2 * key_value_width
    if model.qk_layernorm and model.qk_layernorm_scope == "full":
        numbers += attention_width + key_value_width
    if model.attention_sink:
        numbers += 2 * key_value_width
    return numbers


def layer_vectors_whole(model: ModelConfig) -> int:
    """Numbers of one layer that every TP rank holds whole: norms, and the bias behind the MLP."""
    norms = 2 * model.hidden_size
    if model.qk_layernorm and model.qk_layernorm_scope == "head":
        norms += 2 * model.head_size
    return norms + (model.hidden_size if model.mlp_bias else 0)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Trainable numbers of the model; rows that only pad the vocabulary are included."""
    embedding = model.padded_vocab_size * model.hidden_size
    layer = layer_matrices(model) + layer_vectors_split(model) + layer_vectors_whole(model)
    return ParameterCount(
        embedding=embedding,
        layers=model.num_layers * layer,
        final_norm=model.hidden_size,
        output_layer=embedding if model.untie_embeddings_and_output_weights else 0,
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
    twice, noisy and clean. Norms, activations and softmax are not counted.
    """
    attention_width, _ = _widths(model)
    output_rows = model.padded_vocab_size * model.hidden_size
    visible_keys = visible_keys_per_token(model, objective)
    return FlopCount(
        linear=2.0 * model.num_layers * layer_matrices(model) * slots_per_token(objective),
        attention=4.0 * model.num_layers * attention_width * visible_keys,
        output_layer=2.0 * output_rows * mean_scored_share(objective),
    )


def training_flops_per_token(model: ModelConfig, objective: ObjectiveConfig) -> FlopCount:
    """Forward and backward pass: three times the forward pass; no recomputation counted."""
    forward = forward_flops_per_token(model, objective)
    return FlopCount(3 * forward.linear, 3 * forward.attention, 3 * forward.output_layer)


def memory_per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    objective: ObjectiveConfig,
    batch: BatchLayout,
) -> MemoryEstimate:
    """The larger of the first and the last pipeline stage.

    Per parameter: weight 2 bytes (4 in fp32), gradient 4 (reduced in fp32), Adam moments 8 and in
    bf16 a main copy 4, both shared out over the data-parallel ranks. Activations: see
    `activation_bytes_per_token`. Not counted: CUDA context, NCCL buffers, fragmentation.
    """
    stages = parallel.pipeline_model_parallel_size
    return max(
        (
            _memory_of_stage(model, parallel, objective, batch, is_first=first, is_last=last)
            for first, last in [(True, stages == 1), (stages == 1, True)]
        ),
        key=lambda memory: memory.total,
    )


def activation_bytes_per_token(
    model: ModelConfig, parallel: ParallelConfig, element_bytes: int
) -> float:
    """Bytes that one layer keeps for its backward pass, per slot (see `slots_per_token`).

    Kept per slot, in elements: input and output of both norms (4h, split by sequence parallelism
    only), and split over TP: query, key, value (a + 2k), the same again where they are normalised
    (a + k), attention output (a), MLP (3f with a gate, 2f without). Fused attention keeps no S * S
    scores. Dropout adds a mask of one byte per element. Full recompute keeps the input of a unit.
    """
    attention_width, key_value_width = _widths(model)
    hidden, tensor_size = model.hidden_size, parallel.tensor_model_parallel_size
    sequence_split = tensor_size if parallel.sequence_parallel else 1
    if model.recompute_granularity == "full":
        return element_bytes * hidden / sequence_split / model.recompute_num_layers
    split = 2 * attention_width + 2 * key_value_width
    split += attention_width + key_value_width if model.qk_layernorm else 0
    split += (3 if model.activation == "swiglu" else 2) * model.ffn_size
    whole = 4 * element_bytes * hidden + (2 * hidden if model.hidden_dropout > 0 else 0)
    return element_bytes * split / tensor_size + whole / sequence_split


def _memory_of_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    objective: ObjectiveConfig,
    batch: BatchLayout,
    *,
    is_first: bool,
    is_last: bool,
) -> MemoryEstimate:
    tensor_size = parallel.tensor_model_parallel_size
    element_bytes = 2 if batch.precision == "bf16" else 4
    parameters = stage_parameters(model, parallel, is_first=is_first, is_last=is_last)
    moments_bytes = 12 if batch.precision == "bf16" else 8
    tokens = batch.micro_batch_size * model.seq_length / parallel.context_parallel_size
    slots = tokens * slots_per_token(objective)
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    per_layer = activation_bytes_per_token(model, parallel, element_bytes)
    activations = per_layer * layers * slots * _in_flight(parallel, batch, is_first=is_first)
    if model.recompute_granularity == "full":  # one unit is being computed again
        kept_whole = activation_bytes_per_token(_without_recompute(model), parallel, element_bytes)
        activations += kept_whole * model.recompute_num_layers * slots
    scored_slots = tokens * mean_scored_share(objective) if is_last else 0.0
    return MemoryEstimate(
        weights=parameters * element_bytes,
        gradients=parameters * 4.0,
        optimizer=parameters * moments_bytes / batch.data_parallel_size,
        activations=activations,
        logits=_logit_bytes(model, batch, scored_slots, tensor_size=tensor_size),
    )


def _logit_bytes(
    model: ModelConfig, batch: BatchLayout, scored_slots: float, *, tensor_size: int
) -> float:
    """A logit is there in the training precision, in fp32 and as a gradient.

    A loss in chunks has only those of one chunk, but also the gradients of all scored hidden states
    and, in fp32, of the output layer before they join the others.
    """
    element_bytes = 2 if batch.precision == "bf16" else 4
    rows, chunk = model.padded_vocab_size / tensor_size, batch.loss_chunk_slots
    if chunk is None or scored_slots == 0:
        return scored_slots * rows * (2 * element_bytes + 4)
    gradients = model.hidden_size * (element_bytes * scored_slots + 4 * rows)
    return min(scored_slots, float(chunk)) * rows * (2 * element_bytes + 4) + gradients


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, *, is_first: bool, is_last: bool
) -> float:
    """Numbers that one rank of a pipeline stage holds."""
    tensor_size = parallel.tensor_model_parallel_size
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    split = layer_matrices(model) + layer_vectors_split(model)
    parameters = layers * (split / tensor_size + layer_vectors_whole(model))
    table = model.padded_vocab_size * model.hidden_size / tensor_size
    # A tied table is one tensor only where both of its ends are on this rank.
    is_shared = is_first and is_last and not model.untie_embeddings_and_output_weights
    num_tables = 1 if is_shared else int(is_first) + int(is_last)
    return parameters + num_tables * table + (model.hidden_size if is_last else 0)


def _in_flight(parallel: ParallelConfig, batch: BatchLayout, *, is_first: bool) -> float:
    """Micro-batches whose activations a stage holds at once (1F1B schedule)."""
    stages = parallel.pipeline_model_parallel_size
    depth = float(stages if is_first else 1)
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and is_first:  # interleaving starts deeper into the pipeline
        depth *= 1 + (stages - 1) / (stages * chunks)
    return min(depth, float(batch.num_micro_batches))


def _without_recompute(model: ModelConfig) -> ModelConfig:
    return replace(model, recompute_granularity="none")


def _widths(model: ModelConfig) -> tuple[int, int]:
    """(query width, key width = value width)."""
    return model.num_attention_heads * model.head_size, model.query_groups * model.head_size
