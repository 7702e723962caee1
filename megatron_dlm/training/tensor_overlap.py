"""Opens what parallel.tp_comm_overlap needs before the first pass. Not yet run on GPUs."""

from __future__ import annotations

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import slots_per_token


def open_tensor_overlap(config: RunConfig) -> None:
    """The buffers of the run, if it asks for them; collective over all ranks."""
    parallel = config.parallel
    if not parallel.tp_comm_overlap:
        return
    from megatron_dlm.runtime.cuda import open_overlap_buffers

    slots = config.model.seq_length * slots_per_token(config.objective)
    open_overlap_buffers(
        config.train.micro_batch_size * slots // parallel.context_parallel_size,
        config.model.hidden_size,
        parallel.tensor_model_parallel_size,
    )
