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
from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.engine_options import engine_options, transformer_implementation
from megatron_dlm.models.fp8 import fp8_options
from megatron_dlm.models.moe import moe_options
from megatron_dlm.runtime.device import Device

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "squared_relu": squared_relu,
    "gelu": functional.gelu,
}
# FP8 is what the layers multiply in; what they keep is bf16.
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: str,
    device: Device,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Megatron Core's TransformerConfig of this run; fp8 is read where precision is fp8.

    Raises ValueError for an unknown or an already named option in model.megatron, and for what the
    device does not have.
    """
    options = _options(model, parallel, precision=precision, device=device)
    if precision == "fp8":
        _refuse_local_layers(model)
        options |= fp8_options(fp8 or Fp8Config(), device.capabilities, num_layers=model.num_layers)
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
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    dtype = _DTYPES[precision]
    implementation = transformer_implementation(model, device)
    has_engine = implementation == "transformer_engine"
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
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.attention_communication(has_engine=has_engine),
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
        # Named so that model.megatron cannot ask for what docs/parallelism.md says is not offered.
        "fp8": None,
        "fp8_param": False,
        "cuda_graph_impl": "none",
        "cross_entropy_loss_fusion": False,
        # runtime/determinism.py turns it on, before any model is built.
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
        # Batched point-to-point with PP 2 and VPP gives wrong gradients without an error.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # gloo still reads a sent tensor after the call returns; NCCL is ordered by its stream.
        "deallocate_pipeline_outputs": device.is_cuda,
        **_recompute_options(model),
        **engine_options(model, parallel, device, precision=precision),
        **moe_options(model, has_engine=has_engine),
    }


def _recompute_options(model: ModelConfig) -> dict[str, object]:
    granularity = model.recompute_granularity
    if granularity == "none":
        return {"recompute_granularity": None}
    if granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(model.recompute_modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": model.recompute_num_layers,
    }


def _refuse_local_layers(model: ModelConfig) -> None:
    if model.transformer_impl == "local":
        raise ValueError(
            "train.precision fp8 needs the layers of Transformer Engine, but "
            "model.transformer_impl is local; use auto"
        )


def _leave(weight: Tensor) -> Tensor:
    return weight
