"""Averaged checkpoints against float64 means of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import random_weights, write_step
from torch import Tensor

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.averaging import average, coefficients
from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.inspection import inspect
from megatron_dlm.checkpoint.tensor_reader import TensorReader
from megatron_dlm.config.checkpoint_commands import CheckpointAverageConfig, CheckpointInspectConfig

STEPS = (100, 200, 300)


def make_run(
    run: Path, dtype: torch.dtype = torch.float32, **extra: Any
) -> list[dict[str, Tensor]]:
    weights = [random_weights(step, dtype) for step in STEPS]
    for step, tensors in zip(STEPS, weights, strict=True):
        write_step(run, step, tensors, **extra)
    return weights


def read(run: Path) -> dict[str, Tensor]:
    """All tensors of its checkpoint; those of a stack one by one."""
    reader = TensorReader(find_checkpoint(run).path)
    return {
        key: torch.stack(
            [reader.rows(key, layer, 0, stored.shape[1]) for layer in range(stored.shape[0])]
        )
        if len(stored.shape) > 2
        else reader.rows(key, None, 0, stored.shape[0])
        for key, stored in reader.tensors.items()
    }


def weighted(weights: list[dict[str, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    """In float64."""
    return {
        key: sum(
            factor * tensors[key].double() for factor, tensors in zip(factors, weights, strict=True)
        )
        for key in weights[0]
    }  # type: ignore[return-value]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].shape == values.shape
        torch.testing.assert_close(found[key].double(), values, rtol=tolerance, atol=tolerance)


def test_mean_of_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = make_run(tmp_path / "run")
    output = tmp_path / "averaged"
    average(CheckpointAverageConfig(str(tmp_path / "run"), str(output), last=2))
    assert_close(read(output), weighted(weights[1:], [0.5, 0.5]), 1e-7)
    text = capsys.readouterr().out
    assert f"averaged the weights of steps 200, 300 (mean): {output}/checkpoints/iter_0" in text
    manifest = find_checkpoint(output).manifest
    assert manifest[retention.WEIGHTS_ONLY]
    assert manifest["averaged"]["steps"] == [200, 300]
    assert manifest["model"] == find_checkpoint(tmp_path / "run").manifest["model"]


def test_exponential_average_of_named_steps(tmp_path: Path) -> None:
    weights = make_run(tmp_path / "run")
    config = CheckpointAverageConfig(
        str(tmp_path / "run"),
        str(tmp_path / "averaged"),
        steps=[300, 100, 200],
        kind="ema",
        decay=0.7,
    )
    average(config)
    expected = weights[0]
    for later in weights[1:]:
        expected = {
            key: 0.7 * values.double() + 0.3 * later[key].double()
            for key, values in expected.items()
        }
    assert_close(read(tmp_path / "averaged"), expected, 1e-6)


@pytest.mark.parametrize("decay", [None, 0.5, 0.99])
def test_coefficients_sum_to_one(decay: float | None) -> None:
    for count in (2, 3, 10):
        assert sum(coefficients(count, decay)) == pytest.approx(1, abs=1e-12)
    assert coefficients(4, None) == [0.25] * 4
    assert coefficients(3, 0.5) == [0.25, 0.25, 0.5]


def test_bf16_weights_are_averaged_in_fp32(tmp_path: Path) -> None:
    """From the optimizer's fp32 weights where a checkpoint holds them; and never summed in bf16."""
    precise = [random_weights(step) for step in STEPS]
    for step, tensors in zip(STEPS, precise, strict=True):
        rounded = {key: values.bfloat16() for key, values in tensors.items()}
        kept = {f"optimizer.state.param.{key}": values for key, values in tensors.items()}
        moments = {f"optimizer.state.exp_avg.{key}": values for key, values in tensors.items()}
        write_step(tmp_path / "run", step, {**rounded, **kept, **moments})
    run, expected = str(tmp_path / "run"), weighted(precise, [1 / 3] * 3)
    average(CheckpointAverageConfig(run, str(tmp_path / "fp32"), last=3, dtype="fp32"))
    assert_close(read(tmp_path / "fp32"), expected, 1e-7)
    average(CheckpointAverageConfig(run, str(tmp_path / "same"), last=3))
    found = read(tmp_path / "same")
    for key, values in expected.items():
        assert found[key].dtype == torch.bfloat16
        # A sum in fp32 may fall on the other side of a tie, no more.
        torch.testing.assert_close(found[key].double(), values, rtol=2**-8, atol=0)
        assert (found[key] == values.bfloat16()).double().mean() > 0.95

    rounded_only = make_run(tmp_path / "rounded", torch.bfloat16)
    average(
        CheckpointAverageConfig(
            str(tmp_path / "rounded"), str(tmp_path / "wide"), last=3, dtype="fp32"
        )
    )
    assert_close(read(tmp_path / "wide"), weighted(rounded_only, [1 / 3] * 3), 1e-7)


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "iter_0000200" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"iter_0000200 is damaged: __0_0.distcp"):
        average(CheckpointAverageConfig(str(tmp_path / "run"), str(tmp_path / "out"), last=3))
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"of steps \[100, 200, 300\] only; lower last"):
        average(CheckpointAverageConfig(run, str(tmp_path / "out"), last=4))
    with pytest.raises(ValueError, match=r"no whole checkpoint of step 150 \(has \[100, 200, 300"):
        average(CheckpointAverageConfig(run, str(tmp_path / "out"), steps=[100, 150]))
    with pytest.raises(ValueError, match=r"output_dir .*run holds other files; name a new"):
        average(CheckpointAverageConfig(run, run, last=2))
    write_step(tmp_path / "run", 400, random_weights(0), hidden_size=256)
    with pytest.raises(ValueError, match=r"iter_0000300 holds another model than .*iter_0000400"):
        average(CheckpointAverageConfig(run, str(tmp_path / "out"), last=2))
    for wrong, message in [
        ({}, "give either last"),
        ({"last": 2, "steps": [1, 2]}, "give either last"),
        ({"last": 1}, "last is 1; an average is of 2 or more"),
        ({"steps": [5, 5]}, r"steps is \[5, 5\]; an average is of 2"),
        ({"last": 2, "decay": 1.0}, r"decay is 1.0; it must lie in \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            CheckpointAverageConfig(run, "out", **wrong)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_weights(0)
    tensors["optimizer.state.exp_avg.table"] = tensors["table"]
    path = write_step(tmp_path / "run", 100, tensors).path
    output = tmp_path / "report.json"
    inspect(CheckpointInspectConfig(str(tmp_path / "run"), output=str(output)))
    text = capsys.readouterr().out
    assert f"{path}: step 100, " in text
    assert " in 4 files" in text
    assert "3 x 4 x 5" in text
    assert "optimizer: 1 tensors, 160 B" in text
    assert "exp_avg" not in text
    found = json.loads(output.read_text())
    shapes = {tensor["name"]: tensor["shape"] for tensor in found["tensors"]}
    assert shapes == {key: list(values.shape) for key, values in tensors.items()}
    assert found["file_bytes"] == {
        file.name: file.stat().st_size
        for file in path.iterdir()
        if file.name != retention.MANIFEST_NAME
    }
    inspect(CheckpointInspectConfig(str(path), optimizer=True))
    assert "optimizer.state.exp_avg.table" in capsys.readouterr().out
