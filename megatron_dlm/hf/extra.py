"""Libraries of the extra [hf], which a training machine need not have."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def library(name: str) -> Any:
    """The module; ValueError names the extra where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; install megatron-dlm with its extra [hf]"
        ) from None
