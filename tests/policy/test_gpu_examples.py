"""Every YAML file for GPUs is a run that could start on the GPUs that it names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from sources import ROOT

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.models.fp8 import fp8_options
from megatron_dlm.runtime.capabilities import Capabilities

FILES = sorted((ROOT / "examples" / "configs" / "gpu").glob("*.yaml"))
HOPPER = Capabilities((9, 0), (13, 0), "9.19.0", "2.11.0")


def read(path: Path) -> RunConfig:
    preset = ["--config", "preset:coder_1b7"] if path.stem.startswith("1b7") else []
    return resolve(parse(RunConfig, [*preset, "--config", str(path)], prog="x"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_could_start(path: Path) -> None:
    config = read(path)
    found = re.search(r"([\d,]+) (Hopper )?GPUs", path.read_text())
    assert found is not None, "the file does not say for how many GPUs it is"
    check(config, int(found[1].replace(",", "")))
    assert "ot yet run on a GPU" in path.read_text().replace("\n# ", " ")
    assert config.train.output_dir == f"runs/gpu/{path.stem}"
    assert (config.train.precision == "fp8") == path.stem.endswith("fp8")
    if config.train.precision == "fp8":
        assert fp8_options(config.fp8, HOPPER, num_layers=config.model.num_layers)


def test_twins_differ_in_one_thing() -> None:
    masked, fp8, causal = (
        read(ROOT / "examples" / "configs" / "gpu" / f"1b7_{name}.yaml")
        for name in ("masked_bf16", "masked_fp8", "ar_bf16")
    )
    train = replace(masked.train, output_dir=fp8.train.output_dir, precision="fp8")
    assert replace(masked, train=train) == fp8
    train = replace(masked.train, output_dir=causal.train.output_dir)
    assert replace(masked, train=train, objective=causal.objective) == causal
    assert causal.objective.kind == "autoregressive"
