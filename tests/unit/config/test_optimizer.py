"""The optimizer section: what it refuses, and the numbers it derives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig, check_completep, completep_multipliers
from megatron_dlm.config.parse import dump, parse
from megatron_dlm.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_dlm.config.validate import check

COMPLETEP = OptimizerConfig(parametrization="completep", lr=0.3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "optimizer.lr is 0; it must be greater than 0"),
        ({"adam_beta2": 1.0}, r"optimizer.adam_beta2 is 1.0; it must lie in \[0, 1\)"),
        ({"adam_beta2_by_batch": {256: 1.5}}, "adam_beta2_by_batch has 256: 1.5; it maps"),
        ({"adam_beta2_by_batch": {0: 0.9}}, "adam_beta2_by_batch has 0: 0.9; it maps"),
        ({"weight_decay": -1}, "optimizer.weight_decay is -1; must be >= 0"),
        ({"auxiliary_lr_scale": 0.0}, "optimizer.auxiliary_lr_scale is 0.0; it must be greater"),
        (
            {"bulk_init_scale": 0.5},
            "bulk_init_scale has no meaning for optimizer.parametrization standard; remove it",
        ),
        ({"auxiliary_lr_scale": 0.1}, "auxiliary_lr_scale has no meaning for .* standard"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


def test_beta2_of_a_batch() -> None:
    config = OptimizerConfig(adam_beta2=0.99, adam_beta2_by_batch={256: 0.98, 2048: 0.95})
    betas = {size: config.for_batch(size).adam_beta2 for size in (1, 255, 256, 2047, 2048, 9999)}
    assert betas == {1: 0.99, 255: 0.99, 256: 0.98, 2047: 0.98, 2048: 0.95, 9999: 0.95}
    assert config.for_batch(300).adam_beta2_by_batch == {}
    assert OptimizerConfig().for_batch(8) == OptimizerConfig()


def test_beta2_by_batch_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    given = parse(RunConfig, ["--optimizer.adam_beta2_by_batch", "{256: 0.98}"], "test")
    assert given.optimizer.adam_beta2_by_batch == {256: 0.98}
    (tmp_path / "run.yaml").write_text(dump(given))
    assert parse(RunConfig, ["--config", str(tmp_path / "run.yaml")], "test") == given
    with pytest.raises(ValueError, match="expected a mapping of an integer to a number"):
        parse(RunConfig, ["--optimizer.adam_beta2_by_batch", "{many: 0.98}"], "test")


def test_suggested_multipliers() -> None:
    """The paper's 10B model: 34 layers of width 4608."""
    suggested = completep_multipliers(34, 4608)
    assert suggested.residual_multiplier == pytest.approx(4 / 34)
    assert suggested.output_multiplier == pytest.approx(1 / 9)


def test_example_of_the_guide(tmp_path: Path) -> None:
    """The run that docs/parametrization.md shows is one for CompleteP."""
    guide = (Path(__file__).parents[3] / "docs" / "parametrization.md").read_text("utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    run = parse(RunConfig, ["--config", str(tmp_path / "run.yaml")], "test")
    suggested = completep_multipliers(run.model.num_layers, run.model.hidden_size)
    assert run.model.residual_multiplier == pytest.approx(suggested.residual_multiplier, abs=1e-6)
    assert run.model.output_multiplier == pytest.approx(suggested.output_multiplier, abs=1e-6)
    check_completep(run.optimizer, run.model)
    assert run.optimizer.for_batch(256).adam_beta2 == 0.98


def fitting(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_layers": 8,
        "hidden_size": 256,
        "untie_embeddings_and_output_weights": True,
        "residual_multiplier": 0.5,
        "output_multiplier": 2.0,
    }
    return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "model",
    [
        fitting(),
        fitting(residual_multiplier=0.3),  # another constant is a choice, none is a mistake
        fitting(num_layers=4, residual_multiplier=1.0),
        fitting(hidden_size=512, output_multiplier=1.0),
    ],
)
def test_models_for_completep(model: ModelConfig) -> None:
    check_completep(COMPLETEP, model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (fitting(untie_embeddings_and_output_weights=False), "set model.untie_embeddings"),
        (fitting(residual_multiplier=1.0), r"model.residual_multiplier is 1.0.*use 0.5$"),
        (fitting(output_multiplier=1.0), r"model.output_multiplier is 1.0.*use 2$"),
    ],
)
def test_models_that_are_not_built_for_completep(model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_completep(COMPLETEP, model)
    check_completep(OptimizerConfig(), model)


def test_a_run_of_such_a_model_is_refused() -> None:
    run = RunConfig(
        model=fitting(output_multiplier=1.0, vocab_size=1000),
        objective=ObjectiveConfig(mask_token_id=3),
        optimizer=COMPLETEP,
        data=DataConfig(train={"shard": 1.0}),
        train=TrainConfig(steps=10),
    )
    with pytest.raises(ValueError, match=r"model.output_multiplier is 1\.0"):
        check(run, world_size=1)
