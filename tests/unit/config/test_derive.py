"""Numbers that follow from a configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.derive import (
    data_parallel_size,
    num_micro_batches,
    resolve,
    step_tokens,
    total_steps,
    world_size_of,
)
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.parse import dump, parse
from megatron_dlm.config.schema import DataConfig, RunConfig, TrainConfig


def run_of(**sections: Any) -> RunConfig:
    return replace(RunConfig(), **sections)


def test_resolve_fills_from_the_tokenizer_and_is_idempotent(tokenizer_directory: Path) -> None:
    config = run_of(data=DataConfig(tokenizer=str(tokenizer_directory)))
    resolved = resolve(config)
    assert (resolved.model.vocab_size, resolved.objective.mask_token_id) == (1000, 3)
    assert resolve(resolved) == resolved


def test_resolved_yaml_loads_to_an_equal_configuration(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    config = run_of(data=DataConfig(tokenizer=str(tokenizer_directory), train={"a": 1.0}))
    resolved = resolve(config)
    path = tmp_path / "config.yaml"
    path.write_text(dump(resolved))
    assert parse(RunConfig, ["--config", str(path)], prog="x") == resolved


def test_given_values_win_over_the_tokenizer(tokenizer_directory: Path) -> None:
    config = run_of(
        data=DataConfig(tokenizer=str(tokenizer_directory)),
        model=ModelConfig(vocab_size=1024),
        objective=ObjectiveConfig(mask_token_id=1001),
    )
    assert resolve(config) == config


def test_vocabulary_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match=r"vocabulary size is unknown; give data\.tokenizer"):
        resolve(RunConfig())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8"}, 8),
        ({"SLURM_NTASKS": "4"}, 4),
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "4"}, 2),
    ],
)
def test_world_size(environment: dict[str, str], expected: int) -> None:
    assert world_size_of(environment) == expected


def test_world_size_that_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE is x; it must be a positive integer"):
        world_size_of({"WORLD_SIZE": "x"})


LAYOUT = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def test_data_parallel_ranks_and_micro_batches() -> None:
    config = run_of(parallel=LAYOUT, train=TrainConfig(global_batch_size=24, micro_batch_size=2))
    assert data_parallel_size(config, 12) == 3
    assert num_micro_batches(config, 12) == 4
    assert num_micro_batches(config, 4) == 12


def test_world_size_error_names_sizes_and_remedy() -> None:
    message = r"world size is 6.*tensor 2 \* pipeline 2.*multiple of 4.*torchrun --nproc-per-node 4"
    with pytest.raises(ValueError, match=message):
        data_parallel_size(run_of(parallel=LAYOUT), 6)


def test_batch_error_names_the_multiple() -> None:
    config = run_of(train=TrainConfig(global_batch_size=10, micro_batch_size=2))
    message = r"global_batch_size 10 .*micro_batch_size 2 \* 2 data-parallel.*a multiple of 4"
    with pytest.raises(ValueError, match=message):
        num_micro_batches(config, 2)


def length_of(num_windows: int, **length: Any) -> int:
    model, train = ModelConfig(seq_length=16), TrainConfig(global_batch_size=8, **length)
    return total_steps(run_of(model=model, train=train), num_windows)


def test_steps_tokens_and_epochs() -> None:
    assert step_tokens(run_of(model=ModelConfig(seq_length=16))) == 128
    assert length_of(0, steps=7) == 7
    assert length_of(0, tokens=128 * 5) == 5
    assert length_of(0, tokens=128 * 5 + 1) == 6  # rounded up to whole steps
    assert length_of(10, epochs=4) == 5
    assert length_of(11, epochs=1) == 2
    # 1.1 * 80 is 88.00000000000001 in floats, but 11 steps of 8 as written.
    assert length_of(80, epochs=1.1) == 11


def test_published_run_has_its_published_length() -> None:
    # 96 epochs of 1B tokens in 2048-token samples, 256 a step (the paper's 183,105 rounds down).
    config = run_of(
        model=ModelConfig(seq_length=2048), train=TrainConfig(global_batch_size=256, epochs=96)
    )
    assert total_steps(config, -(-1_000_000_000 // 2048)) == 183_106


def test_length_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"give one of train\.steps, train\.tokens, train\.epochs"):
        length_of(10)
