"""Which kernels compute, as TransformerConfig says it: ours, PyTorch's or Transformer Engine's."""

from __future__ import annotations

import os

from megatron.core.transformer.enums import AttnBackend

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.runtime.device import Device

# Megatron Core sets these from the backend and asserts that nobody set them otherwise.
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BF16_BACKENDS = ("fused", "flash")


def transformer_implementation(model: ModelConfig, device: Device) -> str:
    """`local` or `transformer_engine`; ValueError where the one asked for is missing."""
    if model.transformer_impl == "auto":
        return "transformer_engine" if device.has_transformer_engine else "local"
    if model.transformer_impl == "transformer_engine" and not device.has_transformer_engine:
        raise ValueError(
            "model.transformer_impl is transformer_engine but Transformer Engine needs a GPU and "
            f"the extra [te], and this machine has {device.capabilities.describe()}; install it or "
            "use model.transformer_impl local"
        )
    return model.transformer_impl


def engine_options(
    model: ModelConfig, parallel: ParallelConfig, device: Device, *, precision: str
) -> dict[str, object]:
    """Fields of TransformerConfig about kernels. Raises ValueError for those that are missing."""
    has_engine = transformer_implementation(model, device) == "transformer_engine"
    share = parallel.optimizer_cpu_offload_fraction
    if share > 0 and not device.has_transformer_engine:
        raise ValueError(
            f"parallel.optimizer_cpu_offload_fraction {share} needs a GPU and Transformer Engine; "
            f"this machine has {device.capabilities.describe()}"
        )
    if not has_engine:
        _refuse_without_engine(model, parallel, device)
    offloads = parallel.activation_offload_layers > 0
    return {
        "attention_backend": _attention_backend(model, device, has_engine, precision),
        "apply_rope_fusion": has_engine,
        "bias_activation_fusion": device.is_cuda and model.activation == "swiglu",
        "bias_dropout_fusion": device.is_cuda,
        "gradient_accumulation_fusion": parallel.gradient_accumulation_fusion,
        "tp_comm_overlap": parallel.tp_comm_overlap,
        "cpu_offloading": offloads,
        "cpu_offloading_num_layers": parallel.activation_offload_layers,
    }


def _refuse_without_engine(model: ModelConfig, parallel: ParallelConfig, device: Device) -> None:
    # Megatron Core frees the output of these until the backward pass by a name of the engine's.
    discarding = [name for name in model.recompute_modules if name in ("layernorm", "moe_act")]
    if model.recompute_granularity != "selective":
        discarding = []
    asked = {
        f"model.attention_backend {model.attention_backend}": (
            model.attention_backend not in ("auto", "local")
        ),
        "parallel.tp_comm_overlap": parallel.tp_comm_overlap,
        f"parallel.activation_offload_layers {parallel.activation_offload_layers}": (
            parallel.activation_offload_layers > 0
        ),
        f"model.recompute_modules {', '.join(discarding)}": bool(discarding),
        # On a GPU its matrix product is the engine's; on CPU it is PyTorch's.
        "parallel.gradient_accumulation_fusion": (
            device.is_cuda
            and parallel.gradient_accumulation_fusion
            and not device.capabilities.has_weight_gradient_kernel
        ),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"{name} needs the layers of Transformer Engine; model.transformer_impl is "
                f"{model.transformer_impl} and this machine has {device.capabilities.describe()}"
            )


def _attention_backend(
    model: ModelConfig, device: Device, has_engine: bool, precision: str
) -> AttnBackend:
    name = model.attention_backend
    if not has_engine:
        return AttnBackend.auto  # read by Transformer Engine alone
    if name in _BF16_BACKENDS and precision == "fp32":
        raise ValueError(
            f"model.attention_backend {name} has no kernels for train.precision fp32; use bf16, or "
            "model.attention_backend unfused or local"
        )
    if name == "flash" and device.capabilities.flash_attention is None:
        raise ValueError(
            "model.attention_backend flash needs the package flash-attn; this machine has "
            f"{device.capabilities.describe()}: use fused"
        )
    for variable in _ATTENTION_VARIABLES:
        given = os.environ.get(variable)
        if given not in (None, _variable_value(name, variable)):
            raise ValueError(
                f"the environment sets {variable} to {given}, against model.attention_backend "
                f"{name}; unset it and choose by model.attention_backend alone"
            )
    return AttnBackend[name]


def _variable_value(backend: str, variable: str) -> str:
    if backend == "auto":
        return "1"
    return str(int(variable == f"NVTE_{backend.upper()}_ATTN"))
