"""Proof that an exported model is the checkpoint: both compute the same logits, layer by layer.

One side is Megatron Core's own layer with the weights of the checkpoint under their own names; the
other is the class that `transformers` would load, with its config.json and its safetensors. Both
hold one layer at a time and compute in fp32, so any model fits; weights are compared as written.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import read_config
from megatron_dlm.hf.extra import library
from megatron_dlm.hf.mapping import EMBEDDING, OUTPUT
from megatron_dlm.hf.parity_sides import Side, exported_side, megatron_side
from megatron_dlm.hf.safetensors_reader import CONFIG_FILE, SafetensorsDirectory, read_config_file

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
    exported, class_name = exported_side(directory, described, weights, context)
    dtype = weights.dtype(EMBEDDING)
    with megatron_side(reader, model, objective, context, dtype=dtype) as original:
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


def _embed(side: Side, tokens: Tensor) -> Tensor:
    ids, place = tokens.unique(return_inverse=True)
    rows = torch.cat([side.table(EMBEDDING, int(token), 1) for token in ids])
    return rows[place]


def _compare_logits(
    sides: tuple[Side, Side], hidden: list[Tensor], model: ModelConfig
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
