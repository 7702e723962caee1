"""Our configuration in Megatron Core's words."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.moe import moe_options
from megatron_dlm.runtime.device import Device

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "squared_relu": squared_relu,
    "gelu": functional.gelu,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, precision: str, device: Device
) -> TransformerConfig:
    """Megatron Core's TransformerConfig of this run.

    Raises ValueError for an unknown or an already named option in model.megatron, and for
    Transformer Engine asked for where it is missing.
    """
    options = _options(model, parallel, precision=precision, device=device)
    known = {field.name for field in dataclasses.fields(TransformerConfig) if field.init}
    for name in model.megatron:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.megatron.{name} is no TransformerConfig field{hint}")
        if name in options:
            raise ValueError(
                f"model.megatron.{name} is set by this program from its own sections; remove it"
            )
    return TransformerConfig(**options, **model.megatron)


def _options(
    model: ModelConfig, parallel: ParallelConfig, *, precision: str, device: Device
) -> dict[str, object]:
    recompute = model.recompute_granularity
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    dtype = _DTYPES[precision]
    implementation = transformer_implementation(model, device)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
        "ffn_hidden_size": model.ffn_size,
        "activation_func": _ACTIVATIONS[model.activation],
        "gated_linear_unit": model.activation == "swiglu",
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.normalization_epsilon,
        "layernorm_zero_centered_gamma": model.layernorm_zero_centered_gamma,
        # Also needed here, not only in the layer spec: gradients of these norms are then summed
        # over the TP ranks. Norms over the full width must stay out of that, each rank has its own.
        "qk_layernorm": model.qk_layernorm and model.qk_layernorm_scope == "head",
        "add_bias_linear": model.mlp_bias,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        # The weights are filled by models/parametrization.py, whatever the layout.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "transformer_impl": implementation,
        "recompute_granularity": None if recompute == "none" else recompute,
        "recompute_method": "uniform" if recompute == "full" else None,
        "recompute_num_layers": model.recompute_num_layers if recompute == "full" else None,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
        "bias_activation_fusion": device.is_cuda and model.activation == "swiglu",
        "bias_dropout_fusion": device.is_cuda,
        # Batched point-to-point with PP 2 and VPP gives wrong gradients without an error.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # gloo still reads a sent tensor after the call returns; NCCL is ordered by its stream.
        "deallocate_pipeline_outputs": device.is_cuda,
        **moe_options(model, has_engine=implementation == "transformer_engine"),
    }


def transformer_implementation(model: ModelConfig, device: Device) -> str:
    """`local` or `transformer_engine`; ValueError where the one asked for is missing."""
    if model.transformer_impl == "auto":
        return "transformer_engine" if device.has_transformer_engine else "local"
    if model.transformer_impl == "transformer_engine" and not device.has_transformer_engine:
        raise ValueError(
            "model.transformer_impl is transformer_engine but Transformer Engine needs a GPU and "
            "the extra [te]; install it or use model.transformer_impl local"
        )
    return model.transformer_impl


def _leave(weight: Tensor) -> Tensor:
    return weight
