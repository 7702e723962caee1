"""A small study, from its file to the page: two budgets, two objectives, real runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_corpus import TinyCorpus


@pytest.fixture(scope="module")
def study(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(f"""
name: mini
set:
  model.num_layers: 1
  model.hidden_size: 32
  model.num_attention_heads: 2
  model.seq_length: 32
  data.tokenizer: {tiny_corpus.tokenizer}
  data.train: {{{tiny_corpus.train}: 1.0}}
  data.valid: {{{tiny_corpus.valid}: 1.0}}
  train.steps: 6
  train.global_batch_size: 4
  train.micro_batch_size: 4
  train.precision: fp32
  train.device: cpu
  schedule.warmup_steps: 1
  validation.interval_steps: 3
  validation.num_samples: 4
  checkpoint.interval_steps: 6
  logging.tensorboard: false
axes:
  objective: {{ar: {{objective.kind: autoregressive}}, masked: {{objective.kind: masked}}}}
  unique: {{u1: {{data.unique_tokens: 512}}, u2: {{data.unique_tokens: 1024}}}}
figures:
  crossover: {{kind: crossover, axis: objective, first: ar, second: masked}}
  best: {{kind: final, x: unique_tokens, lines: objective, score: best}}
""")
    return folder


def command(study: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    place = ["--study", str(study / "study.yaml"), "--output_dir", str(study / "out")]
    program = [sys.executable, "-m", "megatron_dlm", "study", name, *place, *flags]
    return subprocess.run(program, capture_output=True, text=True, timeout=280, check=False)


def test_from_file_to_page(study: Path) -> None:
    first = command(study, "run", "--only", "u1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("finished: ") == 2
    rest = command(study, "run")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "mini: 4 runs, 2 of them finished" in rest.stdout
    assert rest.stdout.count("finished: ") == 2
    status = command(study, "status")
    assert "4 finished" in status.stdout
    gathered = command(study, "gather")
    assert gathered.returncode == 0, gathered.stderr
    with (study / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    assert {(row["objective"], row["unique"]) for row in rows} == {
        (objective, unique) for objective in ("ar", "masked") for unique in ("u1", "u2")
    }
    assert all(0 < float(row["nelbo"]) < 10 for row in rows)
    for row in rows:
        facts = json.loads((study / "out" / "runs" / row["run"] / "run.json").read_text())
        assert int(row["num_parameters"]) == facts["num_parameters"]
        assert int(row["tokens"]) == int(row["step"]) * 4 * 32
        assert float(row["training_flops"]) == facts["training_flops_per_token"] * int(
            row["tokens"]
        )
        budget = {"u1": 512, "u2": 1024}[row["unique"]]
        assert (int(row["data.unique_tokens"]), int(row["unique_tokens"])) == (budget, budget)
        kind = {"ar": "autoregressive", "masked": "masked"}[row["objective"]]
        assert row["objective.kind"] == kind
        assert (row["commit"], row["uncommitted_changes"]) == (
            facts["commit"] or "",
            str(facts["uncommitted_changes"]).lower(),
        )
    reported = command(study, "report")
    assert reported.returncode == 0, reported.stdout + reported.stderr
    assert "warning" not in reported.stdout
    page = (study / "out" / "index.html").read_text(encoding="utf-8")
    assert "4 of 4 runs have reported, 8 rows" in page
    assert page.count("<img ") == 2
    with (study / "out" / "crossover.csv").open() as file:
        crossings = list(csv.DictReader(file))
    assert [row["unique"] for row in crossings] == ["u1", "u2"]
    scores = {(row["objective"], row["unique"]): float(row["nelbo"]) for row in rows}
    for row in crossings:  # six steps go down all the way: the best is the last
        assert float(row["best_first"]) == scores["ar", row["unique"]]
        assert float(row["best_second"]) == scores["masked", row["unique"]]


def test_a_failing_run_is_named_and_the_others_go_on(study: Path) -> None:
    broken = (study / "study.yaml").read_text().replace("512", "10000000000")
    (study / "broken.yaml").write_text(broken)
    place = ["--study", str(study / "broken.yaml"), "--output_dir", str(study / "broken")]
    program = [sys.executable, "-m", "megatron_dlm", "study", "run", *place, "--only", "ar_"]
    answer = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False)
    assert answer.returncode == 2
    assert "finished: ar_u2" in answer.stdout
    assert "failed with status 2: ar_u1: megatron-dlm train: error: " in answer.stdout
    assert "1 of 2 runs failed: ar_u1" in answer.stderr
