"""Proof that an exported model is the checkpoint: both compute the same logits, layer by layer.

One side is Megatron Core's own layer with the weights of the checkpoint under their own names; the
other is the class that `transformers` would load, with its config.json and its safetensors. Both
hold one layer at a time and compute in fp32, so any model fits; weights are compared as written.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import Described, read_config
from megatron_dlm.hf.extra import library
from megatron_dlm.hf.load import build_inference_model
from megatron_dlm.hf.mapping import EMBEDDING, FINAL_NORM, OUTPUT, exported_tensors
from megatron_dlm.hf.safetensors_reader import CONFIG_FILE, SafetensorsDirectory, read_config_file
from megatron_dlm.runtime.device import open_device

_STOCK = ("qwen3", "qwen2", "llama")
_VOCABULARY_BLOCK = 4096


@dataclass(frozen=True)
class Parity:
    """How far the logits of the two sides are apart."""

    maximum_difference: float
    mean_difference: float
    largest_logit: float
    same_choice_share: float
    """Share of slots where both find the same token likeliest."""
    num_tokens: int
    tolerance: float
    compared: str
    """What was compared with what."""
    text: str
    """What the tokens were."""

    @property
    def is_equal(self) -> bool:
        return self.maximum_difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return {"equal": self.is_equal, **asdict(self)}


@dataclass(frozen=True)
class _Side:
    """One of the two models, taken apart."""

    layer: Callable[[int, Tensor], Tensor]
    """Number and hidden states [b, s, h] -> hidden states [b, s, h]."""
    norm: Callable[[Tensor], Tensor]
    """Hidden states as the output layer's table multiplies them."""
    table: Callable[[str, int, int], Tensor]
    """Rows of the embedding or the output layer, fp32."""


@torch.no_grad()
def compare(
    directory: Path,
    reader: CheckpointReader,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    tokens: Tensor,
    text: str,
    tolerance: float,
) -> Parity:
    """Logits of the exported `directory` against those of the checkpoint on tokens [b, s].

    Those of a block model are a corrupted and a clean half, as in training; a model that was
    trained with prompts has one here, the first quarter of the slots.
    """
    library("transformers")
    weights = SafetensorsDirectory(directory)
    config = read_config_file(directory)
    described = read_config(config, directory / CONFIG_FILE)
    context = _context(objective, tokens)
    exported, class_name = _exported_side(directory, described, weights, context)
    dtype = weights.dtype(EMBEDDING)
    with _megatron_side(reader, model, objective, context, dtype=dtype) as original:
        sides = (original, exported)
        hidden = [_embed(side, tokens) for side in sides]
        for number in range(model.num_layers):
            hidden = [side.layer(number, x) for side, x in zip(sides, hidden, strict=True)]
        hidden = [side.norm(x).flatten(0, 1) for side, x in zip(sides, hidden, strict=True)]
        found = _compare_logits(sides, hidden, model)
    version = importlib.metadata.version("transformers")
    return Parity(
        **found,
        num_tokens=tokens.numel(),
        tolerance=tolerance,
        compared=f"Megatron Core's layers and {class_name} (transformers {version}), fp32",
        text=text,
    )


def _context(objective: ObjectiveConfig, tokens: Tensor) -> Tensor | None:
    """bool [b, s]: the slots of a prompt, for a model that knows them."""
    if objective.prompt_share == 0 and objective.infilling_share == 0:
        return None
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    return place < (tokens.shape[1] + 3) // 4


def _embed(side: _Side, tokens: Tensor) -> Tensor:
    ids, place = tokens.unique(return_inverse=True)
    rows = torch.cat([side.table(EMBEDDING, int(token), 1) for token in ids])
    return rows[place]


def _compare_logits(
    sides: tuple[_Side, _Side], hidden: list[Tensor], model: ModelConfig
) -> dict[str, float]:
    """Over blocks of the vocabulary: the logits of large ones would not fit."""
    assert model.vocab_size is not None
    name = OUTPUT if model.untie_embeddings_and_output_weights else EMBEDDING
    num_slots = len(hidden[0])
    largest, summed, size = 0.0, 0.0, 0.0
    best = [torch.full((num_slots,), float("-inf")) for _ in sides]
    choice = [torch.zeros(num_slots, dtype=torch.int64) for _ in sides]
    for start in range(0, model.vocab_size, _VOCABULARY_BLOCK):
        count = min(_VOCABULARY_BLOCK, model.vocab_size - start)
        logits = [
            x @ side.table(name, start, count).T for side, x in zip(sides, hidden, strict=True)
        ]
        difference = (logits[0] - logits[1]).abs()
        # A NaN on either side must not pass as small.
        largest = max(largest, float(difference.nan_to_num(nan=float("inf")).max()))
        summed += float(difference.double().sum())
        size = max(size, float(logits[0].abs().max()))
        for side, values in enumerate(logits):
            value, place = values.max(1)
            better = value > best[side]
            choice[side] = torch.where(better, place + start, choice[side])
            best[side] = torch.where(better, value, best[side])
    return {
        "maximum_difference": largest,
        "mean_difference": summed / (num_slots * model.vocab_size),
        "largest_logit": size,
        "same_choice_share": float((choice[0] == choice[1]).double().mean()),
    }


def _exported_side(
    directory: Path, described: Described, weights: SafetensorsDirectory, context: Tensor | None
) -> tuple[_Side, str]:
    module, name = _one_layer_class(directory, described)
    options: dict[str, Any] = {"use_cache": False}
    if described.layout not in _STOCK:
        options = {"context": context, "doubled": described.objective.kind == "block"}
    decoder, norm = module.model, module.model.norm
    decoder.norm = nn.Identity()
    names = [tensor.name for tensor in exported_tensors(described.model)]
    (layer,) = decoder.layers

    def run_layer(number: int, hidden: Tensor) -> Tensor:
        prefix = f"model.layers.{number}."
        state = {
            name.removeprefix(prefix): weights.rows(name).float()
            for name in names
            if name.startswith(prefix)
        }
        layer.load_state_dict(state, assign=True)
        return decoder(inputs_embeds=hidden, **options).last_hidden_state

    def run_norm(hidden: Tensor) -> Tensor:
        norm.load_state_dict({"weight": weights.rows(FINAL_NORM).float()}, assign=True)
        return norm(hidden) * described.model.output_multiplier

    def table(name: str, start: int, count: int) -> Tensor:
        return weights.rows(name, start, count).float()

    return _Side(run_layer, run_norm, table), name


def _one_layer_class(directory: Path, described: Described) -> tuple[Any, str]:
    """The model that transformers would build, with one layer and a vocabulary of one."""
    small = replace(described.model, num_layers=1, vocab_size=1, make_vocab_size_divisible_by=1)
    if described.layout not in _STOCK:
        built = build_inference_model(small, described.objective, described.ids)
        return built.to_empty(device="cpu").eval(), type(built).__name__
    transformers = library("transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    stock = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa"
    ).float()
    return stock.eval(), type(stock).__name__


@contextmanager
def _megatron_side(
    reader: CheckpointReader,
    model: ModelConfig,
    objective: ObjectiveConfig,
    context: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Iterator[_Side]:
    device = open_device("auto")  # before megatron.core is imported
    from megatron_dlm.models.build import build_model, sharding_metadata
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout

    small = replace(
        model,
        num_layers=1,
        vocab_size=1,
        make_vocab_size_divisible_by=1,
        transformer_impl="local",
        recompute_granularity="none",
    )
    with _alone(), laid_out(ParallelConfig()) as parallel:
        seed_dropout(0, 0, parallel)
        (chunk,) = build_model(
            small,
            ParallelConfig(),
            objective,
            precision="fp32",
            seed=0,
            device=device,
            parallel=parallel,
        )
        # Under the names of the checkpoint, as Megatron Core itself gives them.
        places = chunk.sharded_state_dict(metadata=sharding_metadata(parallel))
        weights = [
            place
            for name, place in places.items()
            if name.startswith("decoder.layers.0.") and isinstance(place.data, Tensor)
        ]
        # True hides the key, in Megatron Core's sense.
        mask = None if context is None else context[:, None, :, None] & ~context[:, None, None]

        def read(key: str, layer: int | None, start: int, count: int) -> Tensor:
            return reader.rows(key, layer, start, count).to(dtype).float()

        yield _side_of_megatron(chunk.eval(), weights, read, attention_mask=mask)


def _side_of_megatron(
    chunk: Any,
    weights: list[Any],
    read: Callable[[str, int | None, int, int], Tensor],
    *,
    attention_mask: Tensor | None,
) -> _Side:
    decoder, norm = chunk.decoder, chunk.decoder.final_layernorm
    decoder.final_layernorm = nn.Identity()
    device = norm.weight.device
    mask = None if attention_mask is None else attention_mask.to(device)

    def run_layer(number: int, hidden: Tensor) -> Tensor:
        for weight in weights:
            weight.data.copy_(read(weight.key, number, 0, len(weight.data)))
        rotary = chunk.rotary_pos_emb(hidden.shape[1])
        moved = hidden.transpose(0, 1).to(device)
        run = decoder(hidden_states=moved, attention_mask=mask, rotary_pos_emb=rotary)
        return run.transpose(0, 1).cpu()

    def run_norm(hidden: Tensor) -> Tensor:
        norm.weight.copy_(read("decoder.final_layernorm.weight", None, 0, len(norm.weight)))
        return norm(hidden.to(device)).cpu() * chunk.output_multiplier

    def table(name: str, start: int, count: int) -> Tensor:
        key = {EMBEDDING: "embedding.word_embeddings.weight", OUTPUT: "output_layer.weight"}[name]
        return read(key, None, start, count)

    return _Side(run_layer, run_norm, table)


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
