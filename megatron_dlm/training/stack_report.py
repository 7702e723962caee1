"""What computes in this run, read off the modules that were built: one line per part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_dlm.checkpoint.state import optimizer_parts
from megatron_dlm.models.attention import CoreAttention
from megatron_dlm.runtime.device import Device

_KERNELS = {
    "NVTE_FUSED_ATTN": "cuDNN",
    "NVTE_FLASH_ATTN": "flash-attn",
    "NVTE_UNFUSED_ATTN": "unfused",
}


def stack_report(
    *,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    device: Device,
    loss_chunk_slots: int | None = None,
) -> dict[str, str]:
    """Part -> what it is, of this rank. For the log at start and for run.json."""
    model = chunks[0].module
    config, layer = model.config, model.decoder.layers[0]
    return {
        "machine": f"{device.name}: {device.capabilities.describe()}",
        "precision": _precision(config),
        "layers": f"{config.transformer_impl} spec, {_name(layer.self_attention.linear_qkv)}",
        "attention": _attention(layer.self_attention.core_attention),
        "norms": _norms(layer),
        "loss": "our vocabulary-parallel log-probabilities on the scored slots"
        + (f", {loss_chunk_slots} at a time" if loss_chunk_slots else ""),
        "optimizer": _optimizer(optimizer),
        "gradients": _gradients(chunks[0]),
        "recompute": _recompute(config),
    }


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _precision(config: TransformerConfig) -> str:
    dtype = str(config.params_dtype).removeprefix("torch.")
    if config.fp8:
        dtype += f", matrices of the layers in FP8 ({config.fp8_recipe}, {config.fp8})"
        if config.first_last_layers_bf16:
            first, last = config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
            dtype += f", but for the first {first} and the last {last} layers"
    return dtype + (", deterministic" if config.deterministic_mode else "")


def _attention(core: nn.Module) -> str:
    if isinstance(core, CoreAttention):
        kernel = "flex attention on GPUs" if not core.options.is_fused else "PyTorch's SDPA"
        return f"{_name(core)} ({core.options.pattern.value}, {kernel})"
    allowed = [kernel for name, kernel in _KERNELS.items() if os.environ.get(name, "1") == "1"]
    return f"{_name(core)} (the engine chooses among {', '.join(allowed)})"


def _norms(layer: Any) -> str:
    alone = [
        _name(part)
        for part in (layer.input_layernorm, layer.pre_mlp_layernorm)
        if _name(part) != "IdentityOp"
    ]
    return alone[0] if alone else "fused into the matrix products behind them"


def _optimizer(optimizer: MegatronOptimizer) -> str:
    inner = [part.optimizer for part in optimizer_parts(optimizer)]
    kinds = sorted({f"{type(each).__module__}.{type(each).__name__}" for each in inner})
    return f"{', '.join(kinds)}, sharded over data-parallel ranks"


def _gradients(chunk: DistributedDataParallel) -> str:
    config = chunk.ddp_config
    facts = ["kept and summed in fp32" if config.grad_reduce_in_fp32 else "in the weights' type"]
    if config.overlap_grad_reduce:
        facts.append(f"reduced in {len(chunk.bucket_groups)} buckets during the backward pass")
    if config.overlap_param_gather:
        facts.append("parameters gathered during the forward pass")
    if chunk.module.config.gradient_accumulation_fusion:
        facts.append("added by the matrix products")
    return ", ".join(facts)


def _recompute(config: TransformerConfig) -> str:
    if config.cpu_offloading:
        return f"none; activations of {config.cpu_offloading_num_layers} layers wait on the host"
    if config.recompute_granularity is None:
        return "none"
    if config.recompute_granularity == "full":
        return f"whole layers, {config.recompute_num_layers} at a time"
    return ", ".join(config.recompute_modules)
