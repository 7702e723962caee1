"""FP8 in Megatron Core's words, refused where the machine cannot do it. Not yet run on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.runtime.capabilities import Capabilities


class _Need(NamedTuple):
    capability: tuple[int, int]
    """Compute capability from here on."""
    below: tuple[int, int] | None
    """And below this one."""
    cuda: tuple[int, int]
    """CUDA version from here on."""


# Transformer Engine's own conditions (pytorch/quantization.py).
_NEEDS = {
    "tensorwise": _Need((8, 9), None, (12, 1)),
    "delayed": _Need((8, 9), None, (12, 1)),
    "blockwise": _Need((9, 0), None, (12, 9)),
    "mxfp8": _Need((10, 0), (12, 0), (12, 8)),
}


def fp8_options(
    fp8: Fp8Config, capabilities: Capabilities, *, num_layers: int
) -> dict[str, object]:
    """Fields of TransformerConfig that make the matrix products of the layers FP8.

    Embedding, norms, router, attention itself and output layer stay in bf16. Raises ValueError
    with what the machine has where the recipe needs more, and where no layer is left for FP8.
    """
    _check_machine(fp8, capabilities)
    first, last = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    if first + last >= num_layers:
        raise ValueError(
            f"fp8.num_layers_at_start_in_bf16 {first} and fp8.num_layers_at_end_in_bf16 {last} "
            f"leave none of the {num_layers} layers in FP8; use train.precision bf16"
        )
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        # Megatron Core's defaults, a history of 1 and its most recent value, follow every outlier.
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.keeps_bf16_layers,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def _check_machine(fp8: Fp8Config, capabilities: Capabilities) -> None:
    there = f"this machine has {capabilities.describe()}"
    if capabilities.compute_capability is None or capabilities.transformer_engine is None:
        raise ValueError(
            f"train.precision fp8 needs Transformer Engine on a GPU; {there}: use train.precision "
            "bf16, or install the extra [te]"
        )
    if not _runs(fp8.recipe, capabilities):
        need = _NEEDS[fp8.recipe]
        able = [name for name in _NEEDS if _runs(name, capabilities)]
        remedy = f"use fp8.recipe {' or '.join(able)}" if able else "use train.precision bf16"
        below = "" if need.below is None else f" and below {_dotted(need.below)}"
        raise ValueError(
            f"fp8.recipe {fp8.recipe} needs compute capability {_dotted(need.capability)}{below} "
            f"and CUDA {_dotted(need.cuda)}; {there}: {remedy}"
        )


def _runs(recipe: str, capabilities: Capabilities) -> bool:
    need, found, cuda = _NEEDS[recipe], capabilities.compute_capability, capabilities.cuda
    if found is None or cuda is None:
        return False
    is_low_enough = need.below is None or found < need.below
    return found >= need.capability and is_low_enough and cuda >= need.cuda


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
