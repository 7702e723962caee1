"""Checkpoints of tiny models with arbitrary weights, made on any layout, and Megatron's logits."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opened import opened_model

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import CheckpointConfig, OptimizerConfig, RunConfig
from megatron_dlm.models.accounting import count_parameters

AUTOREGRESSIVE = ObjectiveConfig(kind="autoregressive")
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def tiny_model(**changes: Any) -> ModelConfig:
    """Grouped queries, an odd vocabulary that is padded, and values that no default has."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "seq_length": 24,
        "vocab_size": 77,
        "make_vocab_size_divisible_by": 32,
        "normalization_epsilon": 1e-3,
        "rotary_base": 500,
        "transformer_impl": "local",
    }
    return ModelConfig(**{**defaults, **changes})


def masked(model: ModelConfig) -> ObjectiveConfig:
    assert model.vocab_size is not None
    return ObjectiveConfig(kind="masked", mask_token_id=model.vocab_size - 1)


def save_in_ranks(
    run: Path,
    model: ModelConfig,
    objective: ObjectiveConfig,
    parallel_config: ParallelConfig,
    precision: str = "fp32",
    *,
    tokenizer: str | None = None,
) -> None:
    """One checkpoint of step 3 under `run`, as training saves it; runs inside the ranks."""
    from megatron_dlm.checkpoint.state import TrainState, model_state
    from megatron_dlm.checkpoint.store import Checkpointed, CheckpointStore
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel

    with opened_model(parallel_config, model, objective, precision=precision, seed=0) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        _fill(model_state(chunks, parallel))
        wrapped = wrap_data_parallel(chunks, parallel_config, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(), overlap_param_gather=False)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.step()  # moments are there after the first step only
        config = asdict(RunConfig(model=model, objective=objective, parallel=parallel_config))
        config["data"]["tokenizer"] = tokenizer
        description = {
            "model": config["model"],
            "data": {"digest": "none"},
            "config": config,
            "num_parameters": count_parameters(model).total,
        }
        subject = Checkpointed(wrapped, optimizer, parallel)
        CheckpointStore(run / "checkpoints", CheckpointConfig(), subject, description).save(
            TrainState(step=3)
        )


def megatron_logits(path: Path, tokens: np.ndarray, precision: str = "fp32") -> np.ndarray:
    """Logits [b, s, vocab_size] of Megatron's model, loaded by Megatron; runs inside one rank."""
    from megatron_dlm.checkpoint.find import find_checkpoint, model_of
    from megatron_dlm.checkpoint.store import load_weights

    checkpoint = find_checkpoint(path)
    model, objective = model_of(checkpoint)
    with (
        opened_model(ParallelConfig(), model, objective, precision=precision, seed=1) as opened,
        torch.no_grad(),
    ):
        chunk, parallel = opened.chunk, opened.parallel
        load_weights(checkpoint, [chunk], parallel)
        rows = torch.from_numpy(tokens)
        positions = torch.arange(rows.shape[1]).expand_as(rows)
        logits = chunk.eval()(rows, positions)[:, : model.vocab_size]
        return logits.float().unflatten(0, tuple(rows.shape)).numpy()


def some_tokens(model: ModelConfig, rows: int = 3) -> np.ndarray:
    """int64 [rows, seq_length]; the last id, the mask's, is among them."""
    assert model.vocab_size is not None
    random = np.random.default_rng(5)
    tokens = random.integers(0, model.vocab_size, (rows, model.seq_length))
    tokens[:, ::3] = model.vocab_size - 1
    return tokens


@torch.no_grad()
def _fill(state: dict[str, Any]) -> None:
    """Arbitrary values everywhere, norms and biases included; the same on every layout."""
    from megatron_dlm.models.parametrization import _shards

    for shard in _shards(state):
        random = np.random.default_rng(zlib.crc32(shard.key.encode()))
        whole = random.normal(0, 0.3, shard.global_shape).astype(np.float32)
        local = (1,) * (whole.ndim - shard.data.dim()) + tuple(shard.data.shape)
        place = tuple(
            slice(start, start + size)
            for start, size in zip(shard.global_offset, local, strict=True)
        )
        block = torch.from_numpy(whole[place]).reshape(shard.data.shape)
        shard.data.copy_(block + 1 if "norm" in shard.key else block)
