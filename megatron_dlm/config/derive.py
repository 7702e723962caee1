"""Numbers that follow from a configuration; each one a pure function, nothing is mutated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from megatron_dlm.config.checks import require
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata


def resolve(config: RunConfig) -> RunConfig:
    """Fill the vocabulary size and the ids of mask and pad from the tokenizer where not given.

    Resolving twice changes nothing, so the YAML of a run directory can be loaded again.
    """
    vocab_size = config.model.vocab_size
    mask_token_id, pad_token_id = config.objective.mask_token_id, config.objective.pad_token_id
    if config.data.tokenizer is not None:
        metadata = read_tokenizer_metadata(config.data.tokenizer)
        vocab_size = metadata.vocab_size if vocab_size is None else vocab_size
        mask_token_id = metadata.mask_id if mask_token_id is None else mask_token_id
        if config.objective.empty_token_share > 0 and pad_token_id is None:
            pad_token_id = metadata.pad_id
    require(
        vocab_size is not None,
        "the vocabulary size is unknown; give data.tokenizer (a directory made by "
        "`megatron-dlm tokenizer`) or model.vocab_size",
    )
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        objective=replace(config.objective, mask_token_id=mask_token_id, pad_token_id=pad_token_id),
    )


def world_size_of(environment: Mapping[str, str] | None = None) -> int:
    """Ranks of this job: WORLD_SIZE (torchrun), else SLURM_NTASKS (srun), else 1."""
    environment = os.environ if environment is None else environment
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        text = environment.get(name)
        if text:
            require(
                text.isdigit() and int(text) > 0, f"{name} is {text}; it must be a positive integer"
            )
            return int(text)
    return 1


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model: world_size / (TP * PP * CP)."""
    parallel = config.parallel
    product = parallel.model_parallel_size
    require(
        world_size % product == 0,
        f"the world size is {world_size}, but tensor {parallel.tensor_model_parallel_size} * "
        f"pipeline {parallel.pipeline_model_parallel_size} * context "
        f"{parallel.context_parallel_size} model-parallel ranks need a multiple of {product}; "
        f"start with `torchrun --nproc-per-node {product}` or make the parallel sizes smaller",
    )
    return world_size // product


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Forward passes of one rank in one step."""
    train = config.train
    data_size = data_parallel_size(config, world_size)
    samples = train.micro_batch_size * data_size
    require(
        train.global_batch_size % samples == 0,
        f"train.global_batch_size {train.global_batch_size} is not a multiple of "
        f"train.micro_batch_size {train.micro_batch_size} * {data_size} data-parallel ranks; "
        f"use a multiple of {samples}",
    )
    return train.global_batch_size // samples


def step_tokens(config: RunConfig) -> int:
    """Tokens of one step."""
    return config.train.global_batch_size * config.model.seq_length


def total_steps(config: RunConfig, num_windows: int) -> int:
    """Steps of the whole run, rounded up; `num_windows` samples make one epoch."""
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return -(-train.tokens // step_tokens(config))
    require(
        train.epochs is not None,
        "the length of the run is unknown; give one of train.steps, train.tokens, train.epochs",
    )
    # As written by the user: 9.6 epochs of 10 windows are 96 samples, not 96.00000000000001.
    samples = Fraction(str(train.epochs)) * num_windows
    return int(-(-samples // train.global_batch_size))
