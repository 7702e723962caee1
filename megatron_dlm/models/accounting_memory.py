"""Memory of one rank at the peak of a step, from the configuration alone; imports no torch.

Legend as in accounting.py; e inner width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.accounting import (
    attention_matrices,
    attention_vectors_split,
    expert_parameters,
    inner_bias,
    mean_scored_share,
    mlp_matrices,
    norm_gains,
    outer_bias,
    router_parameters,
    shared_expert_matrices,
    slots_per_token,
)
from megatron_dlm.models.accounting_activations import activation_bytes_per_slot


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


@dataclass(frozen=True)
class HeldParameters:
    """Numbers that one rank holds."""

    dense: float
    """The data-parallel (and context-parallel) ranks hold them too, and share their optimizer."""
    experts: float
    """Held by the fewer ranks that hold the same experts."""

    @property
    def total(self) -> float:
        return self.dense + self.experts


def memory_per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    objective: ObjectiveConfig,
    batch: BatchLayout,
) -> MemoryEstimate:
    """The largest of the pipeline stages.

    Per parameter: weight 2 bytes (4 in fp32; fp8 keeps two more copies of its matrices), gradient 4
    (2 where bf16 gradients are not reduced in fp32), Adam moments 8 and but for fp32 a main copy 4,
    both shared out over the ranks that hold the same parameter. Activations: see
    `activation_bytes_per_slot`. What lies in host memory is not counted, nor are the CUDA context,
    NCCL buffers and fragmentation.
    """
    stages = range(parallel.pipeline_model_parallel_size)
    estimates = [_memory_of_stage(model, parallel, objective, batch, stage=n) for n in stages]
    return max(estimates, key=lambda memory: memory.total)


def _memory_of_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    objective: ObjectiveConfig,
    batch: BatchLayout,
    *,
    stage: int,
) -> MemoryEstimate:
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    is_fp32 = batch.precision == "fp32"
    held = stage_parameters(model, parallel, stage)
    matrices = _layer_matrices(model, parallel, stage) if batch.precision == "fp8" else 0.0
    sharing, expert_sharing = _optimizer_ranks(parallel, batch)
    on_device = 1 - parallel.optimizer_cpu_offload_fraction
    moments_bytes = (8 if is_fp32 else 12) * on_device
    tokens = batch.micro_batch_size * model.seq_length / parallel.context_parallel_size
    slots = tokens * slots_per_token(objective)
    scored_slots = tokens * mean_scored_share(objective) if is_last else 0.0
    return MemoryEstimate(
        weights=held.total * (4 if is_fp32 else 2) + 2 * matrices,
        gradients=held.total * (4.0 if parallel.grad_reduce_in_fp32 or is_fp32 else 2.0),
        optimizer=moments_bytes * (held.dense / sharing + held.experts / expert_sharing),
        activations=slots * _activation_bytes_of_stage(model, parallel, batch, stage),
        logits=_logit_bytes(
            model, batch, scored_slots, tensor_size=parallel.tensor_model_parallel_size
        ),
    )


def _activation_bytes_of_stage(
    model: ModelConfig, parallel: ParallelConfig, batch: BatchLayout, stage: int
) -> float:
    """Per slot: of all layers and all micro-batches in flight, and of the unit that is being
    computed again."""
    whole = replace(model, recompute_granularity="none")
    unit = model.recompute_num_layers if model.recompute_granularity == "full" else 1
    kinds = [kind for kind in _kinds_of_layers(model, parallel, stage) if kind[1] > 0]
    num_layers = sum(count for _, count in kinds)
    kept, again = 0.0, 0.0
    for has_experts, count in kinds:
        of_layer, of_whole_layer = (
            activation_bytes_per_slot(which, parallel, batch.precision, has_experts=has_experts)
            for which in (model, whole)
        )
        kept += count * of_layer
        dropped = (
            of_whole_layer if model.recompute_granularity == "full" else of_whole_layer - of_layer
        )
        again = max(again, unit * dropped)
    on_device = 1 - min(parallel.activation_offload_layers / num_layers, 1.0)
    return kept * on_device * _in_flight(parallel, batch, stage) + again


def _optimizer_ranks(parallel: ParallelConfig, batch: BatchLayout) -> tuple[int, float]:
    """Ranks that share the optimizer state of a dense parameter, and of an expert's."""
    data_and_context = batch.data_parallel_size * parallel.context_parallel_size
    over_stage = data_and_context * parallel.tensor_model_parallel_size
    of_one_expert = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size
    return data_and_context, over_stage / of_one_expert


def _logit_bytes(
    model: ModelConfig, batch: BatchLayout, scored_slots: float, *, tensor_size: int
) -> float:
    """A logit is there in the training precision, in fp32 and as a gradient.

    A loss in chunks has only those of one chunk, but also the gradients of all scored hidden states
    and, in fp32, of the output layer before they join the others.
    """
    element_bytes = 4 if batch.precision == "fp32" else 2
    rows, chunk = model.padded_vocab_size / tensor_size, batch.loss_chunk_slots
    if chunk is None or scored_slots == 0:
        return scored_slots * rows * (2 * element_bytes + 4)
    gradients = model.hidden_size * (element_bytes * scored_slots + 4 * rows)
    return min(scored_slots, float(chunk)) * rows * (2 * element_bytes + 4) + gradients


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> HeldParameters:
    """Numbers that one rank of a pipeline stage holds."""
    tensor_size = parallel.tensor_model_parallel_size
    is_first, is_last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
    (_, num_dense), (_, num_moe) = _kinds_of_layers(model, parallel, stage)
    attention = attention_matrices(model) + attention_vectors_split(model)
    mlp = mlp_matrices(model, model.ffn_size) + inner_bias(model, model.ffn_size)
    dense: float = (num_dense + num_moe) * (attention / tensor_size + norm_gains(model))
    dense += num_dense * (mlp / tensor_size + outer_bias(model))
    dense += num_moe * (shared_expert_matrices(model) / tensor_size + router_parameters(model))
    table = model.padded_vocab_size * model.hidden_size / tensor_size
    # A tied table is one tensor only where both of its ends are on this rank.
    is_shared = is_first and is_last and not model.untie_embeddings_and_output_weights
    num_tables = 1 if is_shared else int(is_first) + int(is_last)
    dense += num_tables * table + (model.hidden_size if is_last else 0)
    num_experts = num_moe * model.moe.num_experts / parallel.expert_model_parallel_size
    share = expert_parameters(model) / parallel.expert_tensor_parallel_size
    return HeldParameters(dense, num_experts * share)


def _layer_matrices(model: ModelConfig, parallel: ParallelConfig, stage: int) -> float:
    """Weights of the stage's layers that fp8 multiplies with, on one rank."""
    (_, num_dense), (_, num_moe) = _kinds_of_layers(model, parallel, stage)
    split = (num_dense + num_moe) * attention_matrices(model)
    split += num_dense * mlp_matrices(model, model.ffn_size)
    split += num_moe * shared_expert_matrices(model)
    experts = num_moe * model.moe.num_experts * expert_parameters(model)
    sharing = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return split / parallel.tensor_model_parallel_size + experts / sharing


def _kinds_of_layers(
    model: ModelConfig, parallel: ParallelConfig, stage: int
) -> list[tuple[bool, float]]:
    """(has experts, number of layers) of a stage; its chunks are as long as all others."""
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    length = model.num_layers / (stages * chunks)
    first_moe = model.num_layers - model.num_moe_layers
    starts = [(chunk * stages + stage) * length for chunk in range(chunks)]
    num_moe = sum(max(0.0, start + length - max(start, first_moe)) for start in starts)
    return [(False, chunks * length - num_moe), (True, num_moe)]


def _in_flight(parallel: ParallelConfig, batch: BatchLayout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once (1F1B schedule).

    Interleaving counts in chunks, of which a stage starts 2 (stages - stage - 1) + 1 and those of a
    round over all chunks but one before its first backward pass.
    """
    stages = parallel.pipeline_model_parallel_size
    depth = float(stages - stage)
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None:
        depth = (2 * (stages - stage - 1) + 1 + (chunks - 1) * stages) / chunks
    return min(depth, float(batch.num_micro_batches))
