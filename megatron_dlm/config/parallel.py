"""The section that says how model and batch are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction, require_positive


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
    context_parallel_comm: Literal["auto", "all_gather", "a2a", "p2p"] = "auto"
    """How attention reaches the slots of other CP ranks. all_gather: every rank fetches all keys
    and values; a2a: ranks trade slots for heads (Ulysses); p2p: keys and values go round while
    attention runs (Transformer Engine only); auto: p2p with Transformer Engine, else all_gather."""
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
    grad_reduce_in_fp32: bool = True
    """Keep and sum gradients in fp32; false keeps and sends those of bf16 weights in bf16, which
    halves that memory and traffic and rounds every sum."""
    bucket_size_parameters: int | None = None
    """Parameters whose gradients travel together under overlap_grad_reduce; default: 40 million, or
    1 million per DP rank if that is more."""
    pad_buckets_for_high_nccl_busbw: bool = False
    """Pad buckets to multiples of 2^16, which NCCL sends faster over hundreds of DP ranks."""
    gradient_accumulation_fusion: bool = False
    """Matrix products of the backward pass add into the gradient buffers themselves."""
    tp_comm_overlap: bool = False
    """Send parts of TP collectives while the matrix product beside them runs (Transformer Engine;
    needs sequence_parallel)."""
    optimizer_cpu_offload_fraction: float = 0.0
    """Share of the optimizer's state that lives, and is updated, in host memory (GPUs only)."""
    activation_offload_layers: int = 0
    """First layers of each rank whose activations wait in host memory for the backward pass
    (Transformer Engine; needs one pipeline stage and no recompute)."""
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
        self._check_memory_options()

    def _check_memory_options(self) -> None:
        bucket = self.bucket_size_parameters
        require(
            bucket is None or bucket > 0,
            f"parallel.bucket_size_parameters is {bucket}; it must be greater than 0",
        )
        require(
            bucket is None or self.overlap_grad_reduce,
            f"parallel.bucket_size_parameters is {bucket}, but gradients travel in buckets only "
            "with parallel.overlap_grad_reduce",
        )
        offloaded = {"optimizer_cpu_offload_fraction": self.optimizer_cpu_offload_fraction}
        require_fraction("parallel", offloaded)
        layers = self.activation_offload_layers
        require(layers >= 0, f"parallel.activation_offload_layers is {layers}; it must be >= 0")
        require(
            layers == 0 or self.pipeline_model_parallel_size == 1,
            f"parallel.activation_offload_layers {layers} needs "
            "parallel.pipeline_model_parallel_size 1",
        )
        require(
            not self.tp_comm_overlap or self.sequence_parallel,
            "parallel.tp_comm_overlap needs parallel.sequence_parallel",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model (TP * PP * CP)."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def attention_communication(self, *, has_engine: bool) -> str | None:
        """all_gather, a2a or p2p, as Megatron Core spells them; None where nothing is shared.

        has_engine: whether Transformer Engine builds the layers; ValueError for p2p without it.
        """
        if self.context_parallel_size == 1:
            return None
        if self.context_parallel_comm == "auto":
            return "p2p" if has_engine else "all_gather"
        require(
            has_engine or self.context_parallel_comm != "p2p",
            "parallel.context_parallel_comm p2p is Transformer Engine's, which does not build the "
            "layers here; use all_gather or a2a",
        )
        return self.context_parallel_comm
