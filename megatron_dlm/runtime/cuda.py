"""Transformer Engine on a GPU: a slow path that Megatron Core 0.16.1 takes, and overlap buffers.

Not yet run on a GPU.
"""

from __future__ import annotations

import importlib


def adapt_megatron() -> None:
    """Split queries, keys and values without a copy in the backward pass. Idempotent.

    Megatron Core takes this function only where it also finds Transformer Engine's workspace, which
    is gone since version 2.10; it then splits by PyTorch, whose backward pass concatenates.
    """
    attention = importlib.import_module("megatron.core.transformer.attention")
    if getattr(attention, "SplitAlongDim") is None:  # noqa: B009
        parts = importlib.import_module("transformer_engine.pytorch.utils")
        setattr(attention, "SplitAlongDim", parts.SplitAlongDim.apply)  # noqa: B010


def open_overlap_buffers(num_tokens: int, hidden_size: int, tensor_size: int) -> None:
    """Buffers through which TP collectives and matrix products of Transformer Engine overlap.

    num_tokens: of one forward pass, over all TP ranks. Collective over all ranks, once a process;
    call when torch.distributed runs and before the first pass. Needs NVLink between TP ranks.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    base.initialize_ub(
        shape=[num_tokens, hidden_size],
        tp_size=tensor_size,
        quantization_modes=[base.UserBufferQuantizationMode.NONE],
        bootstrap_backend="nccl",
    )
