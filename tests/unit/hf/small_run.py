"""A run directory with one checkpoint of arbitrary weights, written without ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.hf.mapping import CheckpointTensor, checkpoint_tensors
from megatron_dlm.models.accounting import count_parameters


def write_run(
    directory: Path,
    *,
    kind: Any = "masked",
    learned: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
    **changes: Any,
) -> Path:
    """Two layers, 40 tokens, fp32; `learned` goes to the objective section, `changes` to model."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 24,
        "seq_length": 32,
        "vocab_size": 40,
        "make_vocab_size_divisible_by": 16,
    }
    model = ModelConfig(**{**settings, **changes})
    assert model.vocab_size is not None
    mask = None if kind == "autoregressive" else model.vocab_size - 1
    objective = ObjectiveConfig(kind=kind, mask_token_id=mask, **(learned or {}))
    generator = torch.Generator().manual_seed(0)

    def read(tensor: CheckpointTensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in tensor.key)

    config = asdict(RunConfig(model=model, objective=objective))
    config["data"]["tokenizer"] = None if tokenizer is None else str(tokenizer)
    description = {
        "model": config["model"],
        "data": {"digest": None},
        "config": config,
        "num_parameters": count_parameters(model).total,
    }
    write_checkpoint(
        directory / "checkpoints",
        checkpoint_tensors(model),
        read,
        dtype=torch.float32,
        description=description,
    )
    return directory
