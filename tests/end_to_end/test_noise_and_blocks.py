"""Hybrid and block diffusion from `train` to `evaluate` and `generate`, on tiny runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import arguments, metrics, run_here
from tiny_corpus import TinyCorpus

from megatron_dlm.evaluation.shards import evaluate_shards
from megatron_dlm.hf.load import load_model

STEPS, NUM_WINDOWS = 24, 16
KINDS: dict[str, dict[str, Any]] = {
    "hybrid": {
        "objective__kind": "hybrid",
        "objective__weighting": "surrogate",
        "objective__prompt_share": 0.2,
        "objective__independent_noise_share": 0.2,
    },
    "block": {
        "objective__kind": "block",
        "objective__weighting": "count",
        "objective__highest_mask_rate": 0.9,
    },
    "chain": {
        "objective__kind": "block",
        "objective__block_size": 1,
        "objective__weighting": "count",
    },
}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("noisy")
    for name, changes in KINDS.items():
        settings = {"train__steps": STEPS, "validation__num_samples": NUM_WINDOWS, **changes}
        settings |= {"validation__interval_steps": STEPS, "checkpoint__interval_steps": STEPS}
        assert run_here(arguments(tiny_corpus, root / name, **settings)) == 0
    return {name: root / name for name in KINDS}


def test_they_learn_and_report_the_bound(runs: Runs) -> None:
    for name, run in runs.items():
        rows = metrics(run, "train")
        assert rows[STEPS]["loss"] < rows[1]["loss"]
        # Clipped mask rates are no bound, and none is reported for them.
        assert ("nelbo" in rows[STEPS]) == (name != "block")
        assert 0 < metrics(run, "valid")[STEPS]["nelbo"] < 7


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_agrees_with_validation(name: str, runs: Runs, tiny_corpus: TinyCorpus) -> None:
    trained = metrics(runs[name], "valid")[STEPS]["nelbo"]
    found = evaluate_shards(
        load_model(runs[name]), str(tiny_corpus.valid), limit=NUM_WINDOWS, num_samples=8
    )
    if name == "chain":
        assert found.nats_per_token == pytest.approx(trained, rel=1e-5)
        return
    # Training's has one draw per window, as each of the 8 here.
    error = found.noise_standard_error * math.sqrt(8 + 1)
    assert 0 < error < 0.35 * trained
    assert abs(found.nats_per_token - trained) < 3.5 * error


@pytest.mark.parametrize("name", KINDS)
def test_they_write(name: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(runs[name]), "--prompt", "def ", "import ", "--num_tokens", "12"]
    assert run_here(["generate", *flags, "--num_steps", "6", "--output", "-"]) == 0
    texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [text["prompt"] for text in texts] == ["def ", "import "]
    assert all(text["num_evaluations"] <= 13 for text in texts)
