"""Options that only whole runs can show: length, blends, precision, dropout, variable length."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
from command_line import arguments, assert_same_curves, metrics, run_here, start_ranks
from tiny_corpus import TinyCorpus


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_bf16_learns(kind: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The validation bound falls by over half a nat and stays near that of fp32."""
    last = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        changes = {"objective__kind": kind, "train__steps": 40, "optimizer__lr": 1e-2}
        command = arguments(
            tiny_corpus, run, **changes, train__precision=precision, checkpoint__interval_steps=100
        )
        assert run_here(command) == 0
        valid = metrics(run, "valid")
        assert valid[40]["nelbo"] < valid[8]["nelbo"] - 0.2
        assert valid[40]["nelbo"] < math.log(400) - 0.5
        last[precision] = valid[40]["nelbo"]
    assert last["bf16"] != last["fp32"]
    assert last["bf16"] == pytest.approx(last["fp32"], abs=0.1)


def test_dropout_resumes_bit_for_bit(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    changes = {
        "model__hidden_dropout": 0.1,
        "model__attention_dropout": 0.1,
        "schedule__kind": "constant",
        "validation__interval_steps": 5,
        "train__steps": 10,
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_here([*arguments(tiny_corpus, run, **changes), "--train.steps=5"]) == 0
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    assert run_here(arguments(tiny_corpus, whole, **changes)) == 0
    assert_same_curves(whole, run, tolerance=0)
    dry = tmp_path / "dry"
    without = {**changes, "model__hidden_dropout": 0.0, "model__attention_dropout": 0.0}
    assert run_here(arguments(tiny_corpus, dry, **without)) == 0
    assert metrics(dry)[1]["loss"] != metrics(whole)[1]["loss"]


def test_variable_length_under_sequence_parallel(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Both ranks crop to the same length, and the curve is that of one rank."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {
        "objective__variable_length_probability": 0.5,
        "objective__variable_length_multiple": 4,
        "train__steps": 10,
    }
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    jobs = start_ranks(arguments(tiny_corpus, run, **changes, **layout), tmp_path / "log")
    for ended in [job.end() for job in jobs]:
        assert ended.code == 0, ended.errors
    assert run_here(arguments(tiny_corpus, whole, **changes)) == 0
    assert_same_curves(whole, run)
    fixed = tmp_path / "fixed"
    assert run_here(arguments(tiny_corpus, fixed, train__steps=10)) == 0
    differing = [s for s in range(1, 11) if metrics(fixed)[s]["loss"] != metrics(whole)[s]["loss"]]
    assert differing


def test_blend_of_two_shards_for_half_an_epoch(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(
        tiny_corpus,
        run,
        data__train={str(tiny_corpus.train): 3.0, str(tiny_corpus.other): 1.0},
        data__unique_tokens=4096,
        train__steps=None,
        train__epochs=1.5,
        logging__interval_steps=8,
    )
    assert run_here(command) == 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["unique_tokens"] == 4096
    # 4096 tokens are 128 windows of 32; one and a half passes are 192 samples, 24 steps of 8.
    assert facts["steps"] == 24
    assert list(metrics(run)) == [8, 16, 24]
    assert metrics(run)[24]["epoch"] == 1.5
    assert metrics(run)[24]["tokens"] == 24 * 8 * 32


def test_length_in_tokens_is_rounded_up_to_steps(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"train__steps": None, "train__tokens": 1800, "data__valid": {}}
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    assert list(metrics(run)) == list(range(1, 9))  # ceil(1800 / (8 * 32))
    assert not metrics(run, "valid")


def test_log_interval_averages_over_its_steps(
    whole_run: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Also over a stop in the middle of an interval."""
    run = tmp_path / "run"
    changes = {"schedule__kind": "constant", "checkpoint__interval_steps": 3}
    fine = tmp_path / "fine"
    assert run_here(arguments(tiny_corpus, fine, **changes, train__steps=8)) == 0
    command = arguments(tiny_corpus, run, **changes, logging__interval_steps=4, train__steps=8)
    assert run_here([*command, "--train.steps=7"]) == 0
    for step in (6, 7):  # as if it had been killed after the checkpoint of step 3
        for path in (run / "checkpoints" / f"iter_{step:07d}").iterdir():
            path.unlink()
    assert run_here(command) == 0
    assert list(metrics(run)) == [4, 8]
    for last in (4, 8):
        losses = [metrics(fine)[step]["nelbo"] for step in range(last - 3, last + 1)]
        assert metrics(run)[last]["nelbo"] == pytest.approx(fmean(losses), rel=1e-6)
