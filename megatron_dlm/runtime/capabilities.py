"""What the machine brings besides PyTorch, probed once. What is asked for and missing is an error.

Packages are found without importing them: Transformer Engine takes seconds and needs a driver.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Capabilities:
    """Versions of what is there; None or False for what is not."""

    compute_capability: tuple[int, int] | None = None
    """Of this rank's GPU: (9, 0) is Hopper."""
    cuda: tuple[int, int] | None = None
    """The CUDA version that PyTorch was built for."""
    cudnn: str | None = None
    transformer_engine: str | None = None
    flash_attention: str | None = None
    has_apex: bool = False
    """NVIDIA's apex with its kernels; the project of that name on PyPI is another one."""
    has_weight_gradient_kernel: bool = False
    """Apex's fused_weight_gradient_mlp_cuda."""

    def describe(self) -> str:
        """What there is and what there is not, in one line."""
        if self.compute_capability is None:
            return "no GPU"
        facts = [
            f"compute capability {_dotted(self.compute_capability)}",
            f"CUDA {_dotted(self.cuda)}",
            f"cuDNN {self.cudnn or 'missing'}",
            f"Transformer Engine {self.transformer_engine or 'missing'}",
            f"flash-attn {self.flash_attention or 'missing'}",
            f"Apex {'there' if self.has_apex else 'missing'}",
        ]
        return ", ".join(facts)


NOTHING = Capabilities()
"""Of a run on the CPU."""


def probe_gpu(index: int) -> Capabilities:
    """What the machine offers to the rank that uses this GPU."""
    return Capabilities(
        compute_capability=torch.cuda.get_device_capability(index),
        cuda=_pair(torch.version.cuda),
        cudnn=_cudnn_version(),
        transformer_engine=_version("transformer_engine", "transformer-engine"),
        flash_attention=_version("flash_attn", "flash-attn"),
        has_apex=has_apex(),
        has_weight_gradient_kernel=_exists("fused_weight_gradient_mlp_cuda"),
    )


def has_apex() -> bool:
    """NVIDIA's apex brings optimizers and the extension amp_C; PyPI's of that name does not."""
    return _exists("apex") and _exists("apex.optimizers") and _exists("amp_C")


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(module: str, distribution: str) -> str | None:
    if not _exists(module):
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _cudnn_version() -> str | None:
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if number is None:
        return None
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _pair(version: str | None) -> tuple[int, int] | None:
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(pair: tuple[int, int] | None) -> str:
    return "missing" if pair is None else f"{pair[0]}.{pair[1]}"
