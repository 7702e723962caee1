"""Made-up runs of a made-up study, with the files that training leaves, for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.training.status import write_status

BASE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 50}
objective: {mask_token_id: 49}
data: {train: {text: 1.0}, unique_tokens: 1600}
train: {steps: 40, global_batch_size: 4, precision: fp32, device: cpu}
schedule: {warmup_steps: 1}
"""
LINES = """
name: lines
question: Where do straight lines cross?
base: base.yaml
axes:
  objective: {ar: {objective.kind: autoregressive}, masked: {objective.kind: masked}}
  unique: {u1: {data.unique_tokens: 1600}, u2: {data.unique_tokens: 3200}}
  seed: {s1: {train.seed: 1}, s2: {train.seed: 2}}
"""
CROSSOVER = """
figures:
  crossover: {kind: crossover, axis: objective, first: ar, second: masked, x: tokens}
"""
# Of curves that are straight in the epoch: the lines of u1 cross at 20, those of u2 nowhere.
SLOPES = {"ar_u1": 0.05, "masked_u1": -0.05, "ar_u2": 0.0, "masked_u2": -0.01}

Score = Callable[[StudyRun, int], float]
"""Run and epoch -> NELBO."""


def straight(run: StudyRun, epoch: int) -> float:
    """Lines from 2 (ar) and 4 (masked) with the slopes of SLOPES, 0.1 below and above by seed."""
    shift = 0.1 if run.labels["seed"] == "s2" else -0.1
    start = 2 if run.labels["objective"] == "ar" else 4
    slope = SLOPES[f"{run.labels['objective']}_{run.labels['unique']}"]
    return start + shift + slope * epoch


def write_study(folder: Path, text: str = LINES + CROSSOVER) -> Path:
    """study.yaml beside its base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(BASE)
    (folder / "study.yaml").write_text(text)
    return folder / "study.yaml"


def write_runs(path: Path, folder: Path, *, score: Score = straight, last_epoch: int = 40) -> Study:
    """The folders of all runs of a study, 100 tokens and one validation an epoch."""
    study = read_study(path)
    for run in study.runs:
        reports = [
            {
                "step": epoch,
                "split": "valid",
                "nelbo": score(run, epoch),
                "tokens": 100 * epoch,
                "epoch": float(epoch),
                "unique_tokens": 50,
            }
            for epoch in range(1, last_epoch + 1)
        ]
        write_run(folder / "runs" / run.name, run, reports)
    return study


def write_run(path: Path, run: StudyRun, reports: Iterable[dict[str, Any]]) -> None:
    """One finished run."""
    path.mkdir(parents=True)
    config = yaml.safe_load(BASE)
    for key, value in run.settings.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    facts = {
        "num_parameters": 7000,
        "training_flops_per_token": 1000.0,
        "unique_tokens": config["data"]["unique_tokens"],
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "host": "node-1",
    }
    (path / "run.json").write_text(json.dumps(facts))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reports))
    write_status(path, "finished", 40)
