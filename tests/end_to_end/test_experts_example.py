"""examples/06_mixture_of_experts: both runs start from its file, its table, and the whole script
under `slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ended, metrics

from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import prepare
from megatron_dlm.models.accounting import count_parameters

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "06_mixture_of_experts"
SCRIPT = ROOT / "examples" / "06_mixture_of_experts.sh"
# What the script gives each of its runs.
FLAGS = {
    "token_choice": [
        "--model.moe.routing",
        "token_choice",
        "--model.moe.seq_aux_loss_coeff",
        "0.01",
    ],
    "expert_choice": ["--model.moe.routing", "expert_choice"],
}
MEANS = ("moe_load_max_over_mean", "moe_load_min_over_mean", "moe_entropy")
COUNTS = ("moe_experts_per_token", "moe_experts_per_token_std", "moe_dropped_share")


def show(root: Path) -> list[str]:
    command = [sys.executable, str(EXAMPLE / "show.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", FLAGS)
def test_the_runs_are_possible(
    name: str, short_quickstart: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"run {name} {' '.join(FLAGS[name])}\n" in SCRIPT.read_text(encoding="utf-8")
    monkeypatch.chdir(short_quickstart[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = prepare(
        parse(RunConfig, ["--config", str(EXAMPLE / "toy.yaml"), *FLAGS[name]], prog="train")
    )
    assert config.model.moe.routing == name
    count = count_parameters(config.model)
    assert (round(count.total, -5), round(count.active, -5)) == (2_200_000, 900_000)


def test_the_table_shows_first_and_last_of_what_was_logged(tmp_path: Path) -> None:
    for offset, name in enumerate(FLAGS):
        lines = [
            {"step": step, "split": "train", "nelbo": 5 - step / 100 + offset}
            | {key: step / 10 for key in (*MEANS, *COUNTS)}
            for step in range(1, 41)
        ]
        lines.append({"step": 40, "split": "valid", "nelbo": 4.25 + offset})
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    shown = show(tmp_path)
    assert shown[0] == "token_choice: NELBO on held-out text 4.2500 nats per token"
    assert [line.split()[0] for line in shown[2:8]] == ["1", "9", "17", "24", "32", "40"]
    assert shown[7].split() == ["40", "4.600", *["4.000"] * 6]
    assert shown[8] == "expert_choice: NELBO on held-out text 5.2500 nats per token"


@pytest.mark.slow
def test_the_script(short_quickstart: tuple[Path, Ended], tmp_path: Path) -> None:
    """In a copy of the checkout's layout, as the script goes to the folder above itself."""
    for name in ("examples", "megatron_dlm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "quickstart").symlink_to(short_quickstart[0] / "quickstart")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OUTPUT": str(tmp_path / "out"),
        "STEPS": "30",
    }
    script = tmp_path / "06.sh"
    text = SCRIPT.read_text(encoding="utf-8")
    script.write_text(text.replace('cd "$(dirname "$0")/.."', f"cd {tmp_path}"))
    command = ["bash", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    for name in FLAGS:
        logged = metrics(tmp_path / "out" / name, "train")
        assert logged[30]["nelbo"] < logged[10]["nelbo"]
        last = metrics(tmp_path / "out" / name, "valid")[30]["nelbo"]
        assert f"{name}: NELBO on held-out text {last:.4f} nats per token" in ended.stdout
        assert logged[30]["moe_experts_per_token"] == pytest.approx(2, abs=1e-6)
        assert 0 < logged[30]["moe_entropy"] <= 1
    # Every expert takes as many tokens as all others; tokens choose unevenly.
    load = "moe_load_max_over_mean"
    runs = {name: metrics(tmp_path / "out" / name, "train")[30][load] for name in FLAGS}
    assert runs["expert_choice"] == pytest.approx(1, abs=1e-6)
    assert runs["token_choice"] > 1.01
