"""One optimizer update: Megatron's forward-backward schedule around the objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_dlm.models.build import HeadLoss
from megatron_dlm.models.moe_statistics import collect
from megatron_dlm.models.output_layer import chunked_loss
from megatron_dlm.models.packed import PackedDocuments, packed_sequences
from megatron_dlm.objectives.base import LossSums, Objective, loss_terms, micro_batch_loss
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.context_parallel import context_slice
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.training.balancing import weigh_balancing_losses
from megatron_dlm.training.metrics import Metrics


@dataclass(frozen=True)
class Pass:
    """What every forward pass needs besides its batch."""

    chunks: Sequence[DistributedDataParallel]
    objective: Objective
    seed: int
    stream: Stream
    device: Device
    parallel: ParallelContext
    metrics: Metrics
    loss_chunk_slots: int | None = None
    """Scored slots that the output layer and the loss take at a time; None is all."""


def train_step(
    setup: Pass,
    optimizer: MegatronOptimizer,
    micro_batches: list[TokenBatch],
    *,
    before_update: Callable[[], None] | None = None,
) -> float:
    """One update on one global batch; returns the gradient norm before clipping.

    before_update is called when gradients are reduced and not yet clipped.
    """
    for chunk in setup.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run_micro_batches(setup, micro_batches, forward_only=False)
    if before_update is not None:
        before_update()
    _, grad_norm, _ = optimizer.step()
    setup.metrics.add(collect(setup.chunks, setup.parallel))
    return float(grad_norm)


def run_micro_batches(setup: Pass, micro_batches: list[TokenBatch], *, forward_only: bool) -> None:
    """Run this rank's micro-batches through the pipeline; the loss terms go to `setup.metrics`.

    Gradients end up summed over all ranks and divided by the global token count.
    """
    num_rows, columns = micro_batches[0].tokens.shape
    length = setup.objective.model_length(columns - 1)
    has_documents = micro_batches[0].document is not None
    assert all((batch.document is not None) == has_documents for batch in micro_batches)
    if has_documents:  # the rows travel as one sequence
        num_rows, length = 1, num_rows * length
    if not forward_only:
        weigh_balancing_losses(
            setup.chunks,
            micro_batches,
            setup.objective,
            seed=setup.seed,
            stream=setup.stream,
            parallel=setup.parallel,
        )
    iterators: list[Iterator[TokenBatch]] = [iter(micro_batches) for _ in setup.chunks]
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, setup),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(setup.chunks),
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=num_rows,
        forward_only=forward_only,
    )


def _forward_step(
    setup: Pass, batches: Iterator[TokenBatch], chunk: DistributedDataParallel
) -> tuple[Tensor, Any]:
    """The first and the last stage both derive the same inputs, so no mask ever travels.

    So do all context-parallel ranks, and each takes its slots of what was drawn for the whole.
    """
    batch = next(batches)
    objective, model = setup.objective, chunk.module
    packed = _packed(batch, setup)
    batch = batch.to(setup.device.torch_device)
    mask = objective.attention_mask(batch, setup.seed, setup.stream)
    if not (model.pre_process or model.post_process):
        return chunk(None, None, packed=packed, attention_mask=mask), None
    inputs = objective.prepare(batch, setup.seed, setup.stream)
    if packed is not None:
        inputs = inputs.one_row()
    context = setup.parallel.context
    inputs = context_slice(inputs, rank=context.rank, size=context.size)
    is_chunked = model.post_process and setup.loss_chunk_slots is not None
    output = chunk(
        inputs.tokens,
        inputs.position_ids,
        scored=inputs.scored,
        packed=packed,
        attention_mask=mask,
        loss=_chunked_loss(setup, inputs) if is_chunked else None,
    )
    return output, partial(_finish_loss, setup, inputs)


def _packed(batch: TokenBatch, setup: Pass) -> PackedDocuments | None:
    """From the batch on the host: the lengths of the documents are needed there."""
    document = batch.input_document
    if document is None:
        return None
    context_size = setup.parallel.context.size
    return packed_sequences(document, setup.device.torch_device, context_size=context_size)


def _chunked_loss(setup: Pass, inputs: ModelInputs) -> HeadLoss:
    """The loss as the output layer calls it, on a few of the scored slots at a time."""
    objective = setup.objective
    chunk_rows = setup.loss_chunk_slots
    assert chunk_rows is not None

    def sums_of_slots(
        layer: nn.Module, hidden: Tensor, weight: Tensor | None, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        scored = inputs.at(slots)

        def sums_of(logits: Tensor, place: slice) -> tuple[Tensor, Tensor]:
            sums = objective.loss_sums(logits, scored.at(place), setup.parallel.tensor.group)
            metrics = [sums.metrics[name] for name in objective.metric_names]
            return sums.loss_sum, torch.stack(metrics)

        return chunked_loss(layer, hidden, weight, sums_of, chunk_rows=chunk_rows)

    return sums_of_slots


def _finish_loss(
    setup: Pass, inputs: ModelInputs, output: Tensor | tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`output` is logits, or the sums of a chunked loss."""
    # Three values and per-token loss: with two, Megatron scales in place by micro-batches and CP.
    objective = setup.objective
    if isinstance(output, Tensor):
        terms = micro_batch_loss(objective, output, inputs, setup.parallel.tensor.group)
    else:
        loss_sum, values = output
        metrics = dict(zip(objective.metric_names, values.unbind(), strict=True))
        terms = loss_terms(objective, LossSums(loss_sum, metrics), inputs)
    if setup.parallel.tensor.rank == 0:
        with torch.no_grad():
            setup.metrics.add(terms.metrics)
    return terms.loss_sum, terms.token_count, {}
