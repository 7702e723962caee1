"""What every study under examples/studies declares can be drawn of the runs that it has."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sources import ROOT
from tiny_corpus import TinyCorpus

from megatron_dlm.config.derive import step_tokens, total_steps
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.scaling.figures.kinds import draw_figure
from megatron_dlm.scaling.flops import table_facts
from megatron_dlm.scaling.results import Results
from megatron_dlm.scaling.study import Study, read_study

NAMES = [
    path.stem
    for path in sorted((ROOT / "examples/studies").glob("*.yaml"))
    if "_base" not in path.stem
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_figures_draw(
    name: str, tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_corpus.tokenizer, tmp_path / "toy/tokenizer")
    monkeypatch.chdir(tmp_path)
    study = read_study(ROOT / f"examples/studies/{name}.yaml")
    results = Results(tuple(made_rows(study)), "made")
    assert study.figures
    for figure, spec in study.figures.items():
        drawn = draw_figure(figure, spec, results, study, tmp_path)
        assert len(drawn.files) == 3
        assert drawn.rows
        assert all(path.stat().st_size > 200 for path in drawn.files)


def made_rows(study: Study) -> Iterator[dict[str, Any]]:
    """Reports as `study gather` finds them, of losses that are made up of size and tokens."""
    for run in study.runs:
        config = study_configs(study)[run.name]
        facts = {
            "study": study.name,
            "run": run.name,
            **run.labels,
            **settings_of(config, study.settings),
            "num_parameters": count_parameters(config.model).total,
            "training_flops_per_token": training_flops_per_token(
                config.model, config.objective
            ).total,
            **table_facts(config.model, config.objective),
            "unique_tokens": config.data.unique_tokens or 10**10,
            "split": "valid",
        }
        windows = -(-(config.data.unique_tokens or 0) // config.model.seq_length)
        steps = total_steps(config, windows)
        start = int(config.train.start_from[-7:]) if config.train.start_from else 0
        for place in range(1, 21):
            step = start + math.ceil((steps - start) * place / 20)
            tokens = step * step_tokens(config)
            yield {**facts, **report(facts, step, tokens, config)}


def report(facts: dict[str, Any], step: int, tokens: int, config: RunConfig) -> dict[str, float]:
    size = facts["num_parameters"]
    epoch = tokens / facts["unique_tokens"]
    is_ar = config.objective.kind == "autoregressive"
    loss = 1 + 30 * size**-0.2 + 30 * tokens**-0.2 + (0.02 * epoch if is_ar else 0.8)
    name = "nll" if not is_ar and config.objective.kind == "masked" else "nelbo"
    noise = {f"{name}_at_noise_{n / 10:.1f}-{(n + 1) / 10:.1f}": loss * n / 10 for n in range(10)}
    return {
        "step": step,
        "tokens": tokens,
        "epoch": epoch,
        "training_flops": tokens * facts["training_flops_per_token"],
        "nelbo": loss,
        **({} if is_ar else noise),
    }


def study_configs(study: Study) -> dict[str, RunConfig]:
    key = study.name
    if key not in _CONFIGS:
        _CONFIGS[key] = study.configs(Path("runs"), study.num_gpus)
    return _CONFIGS[key]


_CONFIGS: dict[str, dict[str, RunConfig]] = {}


def settings_of(config: RunConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for key in keys:
        value: Any = asdict(config)
        for part in key.split("."):
            value = value[part]
        if not isinstance(value, (dict, list, type(None))):
            found[key] = value
    return found
