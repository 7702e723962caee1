"""One `Device` for CUDA (NCCL, Transformer Engine if installed) and CPU (gloo)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dlm.config.hardware import GPUS
from megatron_dlm.runtime.capabilities import NOTHING, Capabilities, probe_gpu
from megatron_dlm.runtime.processes import num_cores
from megatron_dlm.runtime.weight_gradients import stand_in


@dataclass(frozen=True)
class Device:
    """What the rest of the program may know about the machine."""

    torch_device: torch.device
    name: str
    peak_flops: float | None
    """Dense bf16 peak in FLOP/s; None where it is not known (no MFU is reported then)."""
    capabilities: Capabilities = NOTHING

    @property
    def has_transformer_engine(self) -> bool:
        """Transformer Engine is installed and there is a GPU for it."""
        return self.capabilities.transformer_engine is not None

    @property
    def is_cuda(self) -> bool:
        """True for a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def backend(self) -> str:
        """The torch.distributed backend."""
        return "nccl" if self.is_cuda else "gloo"

    def synchronize(self) -> None:
        """Wait until everything that was started on this device is done; for timing."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def memory_bytes(self) -> int:
        """What tensors take on the GPU now, or on CPU the whole process."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.torch_device)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def forget_peak_memory(self) -> None:
        """Give free memory back and look for the peak anew; a process on the CPU cannot."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)


def local_rank() -> int:
    """This process's place on its node, from torchrun or Slurm."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def choose_device(kind: str, *, field: str = "device") -> torch.device:
    """The device of a model that needs no Megatron: auto takes CUDA where it is available.

    Raises ValueError, which names the `field` that asked, when CUDA is asked for and absent.
    """
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ValueError(f"{field} is cuda but torch sees no GPU; use {field} cpu or auto")
    return torch.device("cuda" if has_cuda and kind != "cpu" else "cpu")


def open_device(kind: str) -> Device:
    """Choose the device of this rank and, on CPU, adapt Megatron Core; call before importing
    megatron.core.

    Raises ValueError when CUDA is asked for and absent, or has fewer GPUs than ranks on this node.
    """
    is_cuda = choose_device(kind, field="train.device").type == "cuda"
    return _open_cuda() if is_cuda else _open_cpu()


def _open_cuda() -> Device:
    count, rank = torch.cuda.device_count(), local_rank()
    if rank >= count:
        raise ValueError(
            f"local rank {rank} has no GPU: this node shows {count}; start at most {count} ranks "
            "per node or set train.device cpu"
        )
    # Megatron Core orders its communication kernels by this; it must be set before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(rank)
    name = torch.cuda.get_device_name(rank)
    peak = next((gpu.peak_flops for part, gpu in GPUS.items() if part in name), None)
    capabilities = probe_gpu(rank)
    if capabilities.transformer_engine is not None:
        stand_in()
        from megatron_dlm.runtime.cuda import adapt_megatron

        adapt_megatron()
    return Device(torch.device("cuda", rank), name, peak, capabilities)


def _open_cpu() -> Device:
    from megatron_dlm.runtime.cpu import adapt_megatron

    _hide_gpu_libraries()
    stand_in()
    adapt_megatron()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // ranks_here))
    return Device(torch.device("cpu"), "cpu", None)


def _hide_gpu_libraries() -> None:
    """Megatron Core would take their norms and optimizers for tensors on the CPU as well."""
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
