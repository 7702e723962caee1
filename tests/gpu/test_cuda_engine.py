"""Transformer Engine's layers, FP8 and the options that only a GPU has, against plain settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import arguments, metrics, start
from tiny_corpus import TinyCorpus

from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.models.fp8 import fp8_options
from megatron_dlm.runtime.capabilities import Capabilities, probe_gpu

HAS_GPU = torch.cuda.is_available()
THERE = probe_gpu(0) if HAS_GPU else Capabilities()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(THERE.transformer_engine is None, reason="needs Transformer Engine"),
]
# Heads of 64 and 128 tokens: widths that FP8 and cuDNN take.
SHAPE = {
    "model__hidden_size": 128,
    "model__num_attention_heads": 2,
    "model__seq_length": 64,
    "train__device": "cuda",
    "train__precision": "bf16",
}


def curve(corpus: TinyCorpus, run: Path, **flags: Any) -> dict[int, dict[str, Any]]:
    """Of a run in a process of its own."""
    settings = {**SHAPE, **flags}
    ended = start(arguments(corpus, run, **settings), run.with_suffix(".log"), imports=True).end()
    assert ended.code == 0, ended.errors
    return metrics(run)


def last_loss(found: dict[int, dict[str, Any]]) -> float:
    return float(found[max(found)]["loss"])


@pytest.fixture(scope="module")
def plain(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run with Transformer Engine."""
    run = tmp_path_factory.mktemp("plain") / "run"
    curve(tiny_corpus, run)
    return run


RECIPES = [
    Fp8Config(),
    Fp8Config(recipe="delayed"),
    Fp8Config(recipe="blockwise", format="e4m3"),
    Fp8Config(recipe="mxfp8"),
]


@pytest.mark.parametrize("fp8", RECIPES, ids=lambda fp8: fp8.recipe)
def test_fp8_learns_what_bf16_learns(
    fp8: Fp8Config, plain: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    try:
        fp8_options(fp8, THERE, num_layers=4)
    except ValueError as error:
        pytest.skip(str(error))
    flags = {"fp8__recipe": fp8.recipe, "fp8__format": fp8.format, "train__precision": "fp8"}
    found = curve(tiny_corpus, tmp_path / "run", **flags)
    assert last_loss(found) == pytest.approx(last_loss(metrics(plain)), rel=0.05)
    assert "FP8" in json.loads((tmp_path / "run" / "run.json").read_text())["stack"]["precision"]


OPTIONS: dict[str, dict[str, Any]] = {
    "local spec": {"model__transformer_impl": "local"},
    "fused attention": {"model__attention_backend": "fused"},
    "own attention": {"model__attention_backend": "local"},
    "fused gradient accumulation": {"parallel__gradient_accumulation_fusion": True},
    "recomputed norms": {
        "model__recompute_granularity": "selective",
        "model__recompute_modules": '["layernorm", "mlp"]',
    },
    "offloaded activations": {"parallel__activation_offload_layers": 1},
    "offloaded optimizer": {"parallel__optimizer_cpu_offload_fraction": 0.5},
    "deterministic": {"train__deterministic": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_follow_the_plain_run(
    name: str, plain: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    found = curve(tiny_corpus, tmp_path / "run", **OPTIONS[name])
    assert last_loss(found) == pytest.approx(last_loss(metrics(plain)), rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_resumed_run_keeps_its_moments(
    share: float, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Twelve steps and twelve more, against twenty-four: the gradient norm shows a lost moment."""
    flags = {"parallel__optimizer_cpu_offload_fraction": share, "schedule__kind": "constant"}
    whole = curve(tiny_corpus, tmp_path / "whole", **flags)
    curve(tiny_corpus, tmp_path / "parts", **flags, train__steps=12)
    parts = curve(tiny_corpus, tmp_path / "parts", **flags)
    for step in range(13, 25):
        assert parts[step]["loss"] == pytest.approx(whole[step]["loss"], rel=2e-3), step


def test_checkpoints_interchange_with_the_local_spec(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    flags = {"schedule__kind": "constant"}
    whole = curve(tiny_corpus, tmp_path / "whole", **flags)
    engine = {"model__transformer_impl": "transformer_engine"}
    local = {"model__transformer_impl": "local"}
    for name, first, second in (("to", engine, local), ("from", local, engine)):
        run = tmp_path / name
        curve(tiny_corpus, run, **flags, **first, train__steps=12)
        found = curve(tiny_corpus, run, **flags, **second)
        assert last_loss(found) == pytest.approx(last_loss(whole), rel=0.02), name


def test_the_probe_names_this_machine() -> None:
    described = THERE.describe()
    assert "compute capability" in described
    assert dataclasses.asdict(THERE)["cuda"] is not None
