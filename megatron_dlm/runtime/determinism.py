"""Kernels and collectives whose results repeat bit for bit."""

from __future__ import annotations

import os

import torch

# What each library reads, the value we give, and the values that also keep the promise.
_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":4096:8", ":16:8")),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ("0",)),
    "NCCL_ALGO": ("Ring", ("Ring", "Tree")),
}


def use_deterministic_kernels() -> None:
    """For this process, from now on; call before CUDA and torch.distributed start.

    Raises ValueError where the environment asks for something else. An operation without a
    deterministic kernel raises RuntimeError when it runs.
    """
    for name, (value, accepted) in _VARIABLES.items():
        given = os.environ.setdefault(name, value)
        if given not in accepted:
            raise ValueError(
                f"train.deterministic needs {name} to be one of {', '.join(accepted)}, but the "
                f"environment sets {given}; unset it"
            )
    torch.use_deterministic_algorithms(True)
