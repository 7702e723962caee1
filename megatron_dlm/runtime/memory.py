"""How much memory this rank has needed so far."""

from __future__ import annotations

import resource

import torch

from megatron_dlm.runtime.device import Device


def peak_memory_bytes(device: Device) -> int:
    """The most that tensors took on the GPU, or on CPU the whole process, since its start."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.torch_device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes
