"""Parameters, FLOPs and memory of a model, counted from its configuration alone; imports no torch.

Legend: S sequence length, h hidden size, a heads * head size, k key-value heads * head size,
f MLP width, V padded vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_dlm.config.architecture import ModelConfig, ParallelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig


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


def layer_matrices(model: ModelConfig) -> int:
    """Weights of one layer that tensor parallelism splits: query, key, value, output, MLP."""
    attention_width, key_value_width = _widths(model)
    attention = model.hidden_size * (2 * attention_width + 2 * key_value_width)
    num_mlp_matrices = 3 if model.activation == "swiglu" else 2
    return attention + num_mlp_matrices * model.hidden_size * model.ffn_size


def layer_norms(model: ModelConfig) -> int:
    """Weights of one layer that every TP rank holds whole."""
    return 2 * model.hidden_size + (2 * model.head_size if model.qk_layernorm else 0)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Trainable numbers of the model; rows that only pad the vocabulary are included."""
    embedding = model.padded_vocab_size * model.hidden_size
    return ParameterCount(
        embedding=embedding,
        layers=model.num_layers * (layer_matrices(model) + layer_norms(model)),
        final_norm=model.hidden_size,
        output_layer=embedding if model.untie_embeddings_and_output_weights else 0,
    )


def mean_scored_share(objective: ObjectiveConfig) -> float:
    """Expected share of slots that reach the output layer: the mean mask rate over t ~ U(0, 1)."""
    if objective.kind == "autoregressive":
        return 1.0
    rates = {
        "linear": 1 / 2,
        "cosine": 2 / math.pi,  # mask rate sin(pi/2 t)
        "polynomial": 1 / (objective.schedule_exponent + 1),
    }
    return rates[objective.schedule]


def forward_flops_per_token(model: ModelConfig, objective: ObjectiveConfig) -> FlopCount:
    """Matrix products of one forward pass, per token of a sample.

    Attention is counted as computed by a kernel that skips what the pattern hides: a query sees S
    keys when bidirectional and (S + 1) / 2 on average when causal, so bidirectional attention costs
    twice the causal. Norms, activations and softmax are not counted.
    """
    attention_width, _ = _widths(model)
    is_causal = objective.attention is AttentionPattern.CAUSAL
    visible_keys = (model.seq_length + 1) / 2 if is_causal else model.seq_length
    output_rows = model.padded_vocab_size * model.hidden_size
    return FlopCount(
        linear=2.0 * model.num_layers * layer_matrices(model),
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
    """Bytes that one layer keeps for its backward pass, per token.

    Kept per token, in elements: input and output of both norms (4h, split by sequence parallelism
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
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    per_layer = activation_bytes_per_token(model, parallel, element_bytes)
    activations = per_layer * layers * tokens * _in_flight(parallel, batch, is_first=is_first)
    if model.recompute_granularity == "full":  # one unit is being computed again
        kept_whole = activation_bytes_per_token(_without_recompute(model), parallel, element_bytes)
        activations += kept_whole * model.recompute_num_layers * tokens
    # A logit of a scored slot is there in the training precision, in fp32 and as a gradient.
    scored_tokens = tokens * mean_scored_share(objective) if is_last else 0.0
    logit_bytes = model.padded_vocab_size / tensor_size * (2 * element_bytes + 4)
    return MemoryEstimate(
        weights=parameters * element_bytes,
        gradients=parameters * 4.0,
        optimizer=parameters * moments_bytes / batch.data_parallel_size,
        activations=activations,
        logits=scored_tokens * logit_bytes,
    )


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, *, is_first: bool, is_last: bool
) -> float:
    """Numbers that one rank of a pipeline stage holds."""
    tensor_size = parallel.tensor_model_parallel_size
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    parameters = layers * (layer_matrices(model) / tensor_size + layer_norms(model))
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
