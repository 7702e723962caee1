"""The two sides of a comparison, one layer in memory at a time: Megatron Core and transformers.

A model whose first layers are dense and the others not has one layer of either kind on each side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import Described
from megatron_dlm.hf.extra import library
from megatron_dlm.hf.layouts import STOCK
from megatron_dlm.hf.load import build_inference_model
from megatron_dlm.hf.mapping import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    exported_tensors,
    has_experts,
    layer_place,
)
from megatron_dlm.hf.safetensors_reader import SafetensorsDirectory
from megatron_dlm.runtime.device import open_device


@dataclass(frozen=True)
class Side:
    """One of the two models, taken apart."""

    layer: Callable[[int, Tensor], Tensor]
    """Number and hidden states [b, s, h] -> hidden states [b, s, h]."""
    norm: Callable[[Tensor], Tensor]
    """Hidden states as the output layer's table multiplies them."""
    table: Callable[[str, int, int], Tensor]
    """Rows of the embedding or the output layer, fp32."""


def exported_side(
    directory: Path, described: Described, weights: SafetensorsDirectory, context: Tensor | None
) -> tuple[Side, str]:
    """The class that transformers would load, and its name."""
    model = described.model
    modules = {kind: _one_layer_class(directory, described, kind) for kind in _kinds(model)}
    options: dict[str, Any] = {"use_cache": False}
    if described.layout not in STOCK:
        options = {"context": context, "doubled": described.objective.kind == "block"}
    norm = next(iter(modules.values())).model.norm
    for module in modules.values():
        module.model.norm = nn.Identity()
    names: dict[str, list[str]] = {}
    for tensor in exported_tensors(model):
        names.setdefault(_prefix_of(tensor.name), []).append(tensor.name)

    def run_layer(number: int, hidden: Tensor) -> Tensor:
        decoder = modules[has_experts(model, number)].model
        (layer,) = decoder.layers
        layer.to("meta")  # the weights of the layer before need not be held any longer
        prefix = f"model.layers.{number}."
        state = {name.removeprefix(prefix): weights.rows(name).float() for name in names[prefix]}
        layer.load_state_dict(_named_as_in(layer, state), assign=True)
        return decoder(inputs_embeds=hidden, **options).last_hidden_state

    def run_norm(hidden: Tensor) -> Tensor:
        norm.load_state_dict({"weight": weights.rows(FINAL_NORM).float()}, assign=True)
        return norm(hidden) * model.output_multiplier

    def table(name: str, start: int, count: int) -> Tensor:
        return weights.rows(name, start, count).float()

    return Side(run_layer, run_norm, table), type(module).__name__


def _kinds(model: ModelConfig) -> set[bool]:
    """Whether there are layers with and without experts."""
    return {has_experts(model, layer) for layer in range(model.num_layers)}


def _one_layer(model: ModelConfig, *, is_moe: bool) -> ModelConfig:
    """The model with one layer, of either kind, and a vocabulary of one."""
    moe = replace(model.moe, num_dense_layers=0) if is_moe else MoEConfig()
    return replace(model, num_layers=1, vocab_size=1, make_vocab_size_divisible_by=1, moe=moe)


def _prefix_of(name: str) -> str:
    found = re.match(r"model\.layers\.\d+\.", name)
    return "" if found is None else found.group()


def _named_as_in(layer: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of a layer: in transformers 5 Qwen3-MoE's experts are one tensor."""
    if "mlp.experts.gate_up_proj" not in layer.state_dict():
        return state

    def stacked(which: str) -> Tensor:
        prefix, suffix = "mlp.experts.", f".{which}_proj.weight"
        found = [name for name in state if name.startswith(prefix) and name.endswith(suffix)]
        return torch.stack([state.pop(f"{prefix}{n}{suffix}") for n in range(len(found))])

    gate_up = torch.cat([stacked("gate"), stacked("up")], dim=1)
    fused = {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": stacked("down")}
    return {**state, **fused}


def _one_layer_class(directory: Path, described: Described, is_moe: bool) -> Any:
    """The model that transformers would build, with one layer and a vocabulary of one."""
    if described.layout not in STOCK:
        small = _one_layer(described.model, is_moe=is_moe)
        built = build_inference_model(small, described.objective, described.ids)
        return built.to_empty(device="cpu").eval()
    transformers = library("transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    if described.layout == "qwen3_moe":
        config.mlp_only_layers = [] if is_moe else [0]
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return stock.float().eval()


@contextmanager
def megatron_side(
    reader: CheckpointReader,
    model: ModelConfig,
    objective: ObjectiveConfig,
    context: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Iterator[Side]:
    """Megatron Core's own layers with the checkpoint's weights, rounded to `dtype` as exported."""
    device = open_device("auto")  # before megatron.core is imported
    from megatron_dlm.models.build import build_model
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout

    with _alone(), laid_out(ParallelConfig()) as parallel:
        seed_dropout(0, 0, parallel)
        chunks = {}
        for is_moe in _kinds(model):
            small = replace(
                _one_layer(model, is_moe=is_moe),
                transformer_impl="local",
                recompute_granularity="none",
            )
            (chunk,) = build_model(
                small,
                ParallelConfig(),
                objective,
                precision="fp32",
                seed=0,
                device=device,
                parallel=parallel,
            )
            chunks[is_moe] = _OneLayer(chunk, parallel)
        # True hides the key, in Megatron Core's sense.
        mask = None if context is None else context[:, None, :, None] & ~context[:, None, None]

        def read(key: str, layer: int | None, start: int, count: int) -> Tensor:
            rows = reader.rows(key, layer, start, count)
            return rows.float() if key.endswith("expert_bias") else rows.to(dtype).float()

        yield _side_of_megatron(model, chunks, read, attention_mask=mask)


class _OneLayer:
    """A model of one layer, and where its weights lie in a checkpoint."""

    def __init__(self, chunk: Any, parallel: Any) -> None:
        from megatron_dlm.models.build import sharding_metadata

        self.chunk = chunk.eval()
        self.norm, chunk.decoder.final_layernorm = chunk.decoder.final_layernorm, nn.Identity()
        # Under the names of the checkpoint, as Megatron Core itself gives them.
        places = chunk.sharded_state_dict(metadata=sharding_metadata(parallel))
        self._weights = [
            (name, place)
            for name, place in places.items()
            if name.startswith("decoder.layers.0.") and isinstance(place.data, Tensor)
        ]

    def fill(
        self,
        model: ModelConfig,
        number: int,
        read: Callable[[str, int | None, int, int], Tensor],
    ) -> None:
        """Copy the weights of a layer of the whole model."""
        for name, place in self._weights:
            inside = re.sub(r"^decoder\.layers\.(0\.)?", "", place.key)
            key, stacked = layer_place(model, number, inside)
            expert = re.search(r"\.local_experts\.(\d+)\.", name)
            if expert is not None:
                stacked = int(expert.group(1))
            place.data.copy_(read(key, stacked, 0, len(place.data)))


def _side_of_megatron(
    model: ModelConfig,
    layers: dict[bool, _OneLayer],
    read: Callable[[str, int | None, int, int], Tensor],
    *,
    attention_mask: Tensor | None,
) -> Side:
    any_layer = next(iter(layers.values()))
    norm, device = any_layer.norm, any_layer.norm.weight.device
    mask = None if attention_mask is None else attention_mask.to(device)

    def run_layer(number: int, hidden: Tensor) -> Tensor:
        layer = layers[has_experts(model, number)]
        layer.fill(model, number, read)
        rotary = layer.chunk.rotary_pos_emb(hidden.shape[1])
        moved = hidden.transpose(0, 1).to(device)
        run = layer.chunk.decoder(hidden_states=moved, attention_mask=mask, rotary_pos_emb=rotary)
        return run.transpose(0, 1).cpu()

    def run_norm(hidden: Tensor) -> Tensor:
        norm.weight.copy_(read("decoder.final_layernorm.weight", None, 0, len(norm.weight)))
        return norm(hidden.to(device)).cpu() * any_layer.chunk.output_multiplier

    def table(name: str, start: int, count: int) -> Tensor:
        key = {EMBEDDING: "embedding.word_embeddings.weight", OUTPUT: "output_layer.weight"}[name]
        return read(key, None, start, count)

    return Side(run_layer, run_norm, table)


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of one, whatever launched this process."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
