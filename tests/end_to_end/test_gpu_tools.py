"""The commands that measure GPUs, on the CPU: their logic, their files, their refusals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import arguments
from fork_server import run_script
from tiny_corpus import TinyCorpus

ROOT = Path(__file__).parents[2]
PROFILE, STEP, CURVES = (
    ROOT / "tools" / name
    for name in ("profile_step.py", "benchmarks/gpu_step.py", "benchmarks/fp8_curves.py")
)
RUN = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "device": "cpu", "precision": "fp32"},
}


def write_run(directory: Path, **changes: object) -> Path:
    model = {**RUN["model"], "vocab_size": 90}
    path = directory / "run.yaml"
    content = {**RUN, "model": model, "objective": {"mask_token_id": 89}, **changes}
    path.write_text(yaml.safe_dump(content))
    return path


def test_profile(tmp_path: Path) -> None:
    target = tmp_path / "profile"
    ended = run_script(PROFILE, "--config", write_run(tmp_path), "--profile.output_dir", target)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads((target / "phases.json").read_text())
    phases = facts["phase_seconds"]
    assert set(phases) == {"data", "forward", "backward", "reduce", "optimizer", "rest"}
    assert all(seconds > 0 for seconds in phases.values())
    assert facts["tokens_per_second"] == pytest.approx(8 * 16 / facts["step_seconds"])
    assert facts["mfu"] is None  # the peak of this processor is not known
    assert facts["stack"]["precision"] == "float32"
    with (target / "memory.csv").open() as file:
        memory = list(csv.DictReader(file))
    # Four micro-batches of three steps, each forward and backward.
    assert [row["phase"] for row in memory].count("forward") == 12
    seconds = [float(row["second"]) for row in memory]
    assert seconds == sorted(seconds)
    assert all(int(row["bytes"]) > 10**7 for row in memory)
    with (target / "operators.csv").open() as file:
        operators = {row["operator"]: int(row["calls_per_step"]) for row in csv.DictReader(file)}
    # Per micro-batch the matrices of two layers and the head: 9 products forward, 18 backward.
    assert operators["aten::mm"] >= 4 * 27
    assert json.loads((target / "trace.json").read_text())["traceEvents"]
    for words in ("layers: local spec", "optimizer: torch.optim", "backward", "aten::mm"):
        assert words in ended.stdout


def test_profile_refuses_in_one_line(tmp_path: Path) -> None:
    ended = run_script(PROFILE, "--config", write_run(tmp_path), "--profile.steps", 0)
    assert ended.returncode == 2
    assert "profile.steps" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    fp8 = write_run(tmp_path, train={**RUN["train"], "precision": "fp8", "device": "auto"})
    # Not in a fork of what was imported for the CPU.
    command = [sys.executable, PROFILE, "--config", fp8, "--profile.output_dir", tmp_path / "none"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode in (0, 2)  # 0 where there is a GPU that can
    if ended.returncode == 2:
        [line] = ended.stderr.splitlines()
        assert line.startswith("profile_step.py: error: train.precision fp8 needs")
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tool", [PROFILE, STEP, CURVES], ids=lambda tool: tool.stem)
def test_help(tool: Path) -> None:
    ended = run_script(tool, "--help")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) > 500


def test_step_on_a_toy(tmp_path: Path) -> None:
    """Every contender runs, those of the same work start with the same loss, fp8 is refused."""
    target = tmp_path / "rows.json"
    flags: list[object] = ["--size", "toy", "--device", "cpu", "--rounds", 2]
    flags += ["--precision", "fp32", "fp8", "--micro-batch", 2, 4, "--json", target]
    ended = run_script(STEP, *flags)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(target.read_text())["rows"]
    done = {(row["contender"], row["micro_batch"]): row for row in rows if not row["error"]}
    losses = {key: row["loss"] for key, row in done.items()}
    for size in (2, 4):
        assert losses["masked", size] == pytest.approx(losses["peer", size], rel=1e-5)
    best = max((done["masked", size]["tokens_per_second"], size) for size in (2, 4))[1]
    for name in ("all-slots", "chunked"):
        assert losses[name, best] == pytest.approx(losses["masked", best], rel=1e-5)
    assert abs(losses["experts", best] - losses["masked", best]) > 1e-6
    assert ("autoregressive", best) in done
    peer = max(done["peer", size]["tokens_per_second"] for size in (2, 4))
    for (name, size), row in done.items():
        assert row["tokens_per_second"] == pytest.approx(size * 32 / row["step_seconds"])
        wanted = None if name == "peer" else pytest.approx(row["tokens_per_second"] / peer)
        assert row["times_peer"] == wanted
    refused = [row for row in rows if row["precision"] == "fp8"]
    assert len(refused) == 2
    assert all("needs Transformer Engine on a GPU" in row["error"] for row in refused)


def test_curves_of_two_precisions(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    target = tmp_path / "curves"
    _, *flags = arguments(tiny_corpus, tmp_path, train__output_dir=None, train__precision=None)
    flags.append("--train.steps=8")
    ended = run_script(CURVES, "--output-dir", target, "--precisions", "fp32", "bf16", "--", *flags)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads((target / "curves.json").read_text())
    assert (facts["first"], facts["second"], facts["steps_at_end"]) == ("fp32", "bf16", 2)
    left, right = (
        {
            entry["step"]: entry["loss"]
            for entry in map(json.loads, (target / name / "metrics.jsonl").read_text().splitlines())
            if entry["split"] == "train"
        }
        for name in ("fp32", "bf16")
    )
    wanted = (right[7] - left[7] + right[8] - left[8]) / 2
    assert facts["mean_difference_at_end"] == pytest.approx(wanted, abs=1e-12)
    assert 0 < facts["largest_difference"] < 0.1
    assert (target / "curves.png").stat().st_size > 10_000
