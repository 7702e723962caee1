"""Every YAML file that we ship is a run that could start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from sources import PACKAGE, ROOT

from megatron_dlm.config.derive import resolve, total_steps
from megatron_dlm.config.parse import dump, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.models.transformer_config import transformer_config
from megatron_dlm.runtime.device import open_device

CONFIGS = ROOT / "examples" / "configs"
# Parts of runs; test_study_examples.py and test_moe_examples.py put them together.
PARTS = ("gidd", "openmoe2", "gpu")
EXAMPLES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in PARTS)
# What these add to, which a user names before them.
OVER_SDL_1B = ("super_data_learners", "moe")
PRESETS = sorted((PACKAGE / "config" / "presets").glob("*.yaml"))
BUDGETS = {"0b5_192e": (0.5, 192), "1b_96e": (1, 96), "1b5_64e": (1.5, 64)}
BUDGETS |= {"10b_9e6": (10, 9.6), "96b_1e": (96, 1)}
BUDGETS_OF_RUNS = {
    f"{name}_{kind}": budget for name, budget in BUDGETS.items() for kind in ("ar", "masked")
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    metadata = {
        "kind": "sentencepiece", "vocab_size": 2048, "pad_id": 0, "bos_id": 1, "eod_id": 2,
        "mask_id": 3, "special_ids": [0, 1, 2, 3], "sha256": "0" * 64, "bytes_per_token": 3.0,
    }  # fmt: skip
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    return str(tmp_path)


def read(path: Path, tokenizer: str, *flags: str) -> RunConfig:
    """The file with the tokenizer of a test in place of one that a user makes."""
    files = ["--config", str(path)]
    if path.parent.name in OVER_SDL_1B:
        files = ["--config", "preset:sdl_1b", *files]
    config = parse(RunConfig, [*files, *flags], prog="x")
    if config.data.tokenizer is not None:
        data = dataclasses.replace(config.data, tokenizer=tokenizer)
        config = dataclasses.replace(config, data=data)
    return config


def test_there_are_examples_and_presets() -> None:
    assert {path.stem for path in EXAMPLES} >= {"tiny_ar", "tiny_masked", *BUDGETS_OF_RUNS}
    assert {path.stem for path in PRESETS} >= {"sdl_1b", "coder_1b7", "tiny"}


@pytest.mark.parametrize("name", BUDGETS_OF_RUNS)
def test_published_runs_see_96b_tokens_in_the_published_steps(name: str, tokenizer: str) -> None:
    config = read(CONFIGS / "super_data_learners" / f"{name}.yaml", tokenizer)
    billions, epochs = BUDGETS_OF_RUNS[name]
    assert (config.data.unique_tokens, config.train.epochs) == (billions * 10**9, epochs)
    assert billions * epochs == 96
    num_windows = -(-config.data.unique_tokens // config.model.seq_length)
    assert total_steps(config, num_windows) == 183_106
    assert config.model.vocab_size == 50_269
    assert name in config.train.output_dir


def test_a_published_run_does_not_start_without_its_preset() -> None:
    path = CONFIGS / "super_data_learners" / "1b_96e_ar.yaml"
    with pytest.raises(ValueError, match="vocabulary size is unknown"):
        resolve(parse(RunConfig, ["--config", str(path)], prog="x"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_can_start(path: Path, tokenizer: str, tmp_path: Path) -> None:
    config = read(path, tokenizer)
    parallel = config.parallel
    check(resolve(config), parallel.model_parallel_size * parallel.expert_model_parallel_size)
    transformer_config(  # checks model.megatron against Megatron's own fields
        config.model, parallel, precision=config.train.precision, device=open_device("cpu")
    )
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump(config))
    assert parse(RunConfig, ["--config", str(dumped)], prog="x") == config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_needs_only_data_and_length(path: Path, tokenizer: str) -> None:
    flags = ["--data.train", "{a: 1}", "--train.steps", "100000", "--data.tokenizer", tokenizer]
    check(resolve(read(path, tokenizer, *flags)), 1)


@pytest.mark.parametrize("name", ["tiny_ar", "tiny_masked"])
@pytest.mark.parametrize("virtual", ["null", "2"])
def test_tiny_examples_fit_four_ranks(name: str, virtual: str, tokenizer: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    prefix = "--parallel."
    flags = [f"{prefix}tensor_model_parallel_size=2", f"{prefix}pipeline_model_parallel_size=2"]
    flags += [f"{prefix}virtual_pipeline_model_parallel_size={virtual}"]
    check(resolve(read(path, tokenizer, *flags, f"{prefix}sequence_parallel=true")), 4)


@pytest.mark.parametrize("name", ["tiny", *(f"super_data_learners/{name}" for name in BUDGETS)])
def test_twins_differ_in_the_objective_only(name: str, tokenizer: str) -> None:
    left, right = (read(CONFIGS / f"{name}_{kind}.yaml", tokenizer) for kind in ("ar", "masked"))
    assert (left.objective.kind, right.objective.kind) == ("autoregressive", "masked")
    train = dataclasses.replace(right.train, output_dir=left.train.output_dir)
    assert dataclasses.replace(right, objective=left.objective, train=train) == left
    assert right.train.output_dir != left.train.output_dir
