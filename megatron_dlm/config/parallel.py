"""The section that says how model and batch are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.checks import require, require_positive


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are split over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule, VPP); needs PP > 1."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of an MoE layer (EP)."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share each expert (ETP)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the TP ranks (SP); needs TP > 1."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over DP ranks while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters over DP ranks while the forward pass runs; needs overlap_grad_reduce."""
    distributed_timeout_minutes: float = 10.0
    """Minutes before a collective without answer ends the run."""

    def __post_init__(self) -> None:
        require_positive(
            "parallel",
            {
                "tensor_model_parallel_size": self.tensor_model_parallel_size,
                "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
                "context_parallel_size": self.context_parallel_size,
                "expert_model_parallel_size": self.expert_model_parallel_size,
                "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
                "distributed_timeout_minutes": self.distributed_timeout_minutes,
            },
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1",
        )
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or (virtual > 1 and self.pipeline_model_parallel_size > 1),
            f"parallel.virtual_pipeline_model_parallel_size is {virtual}; it must be at least 2 "
            "and needs parallel.pipeline_model_parallel_size > 1",
        )
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce",
        )
        require(
            self.context_parallel_size == 1,
            f"parallel.context_parallel_size is {self.context_parallel_size}; context parallelism "
            "is not available yet, use 1",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model (TP * PP * CP)."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
