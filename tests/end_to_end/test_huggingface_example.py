"""examples/03_huggingface on a tiny run: the same lines as shown, and numbers that must hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import arguments, latest, metrics, run_here
from tiny_corpus import TinyCorpus

pytest.importorskip("transformers", reason="transformers is the extra [hf]")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "03_huggingface"
STEPS = 5


@pytest.fixture(scope="module")
def shown(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the example wrote, and what it printed."""
    root = tmp_path_factory.mktemp("example")
    short = {"train__steps": 30, "checkpoint__interval_steps": 30}
    ar = arguments(tiny_corpus, root / "ar", objective__kind="autoregressive", **short)
    assert run_here(ar) == 0
    masked = arguments(tiny_corpus, root / "masked", objective__kind="masked", **short)
    command = [sys.executable, "-m", "megatron_dlm", *masked, "--print_config"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(root / "hf_home")}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (root / "masked.yaml").write_text(answer.stdout)
    command = [sys.executable, str(EXAMPLE / "run.py"), f"--ar={root / 'ar'}"]
    command += [f"--masked_config={root / 'masked.yaml'}", f"--steps={STEPS}"]
    command += [f"--output={root / 'out'}", "--set", "--optimizer.lr", "1e-3"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return root / "out", ended.stdout


def test_it_prints_what_it_says(shown: tuple[Path, str]) -> None:
    def shape(text: str) -> list[str]:
        """Numbers, texts and what follows the name of a command left out."""
        lines = [re.sub(r"'.*'|\".*\"", "TEXT", line) for line in text.splitlines()]
        lines = [re.sub(r"(\$ megatron-dlm \w+).*", r"\1", line) for line in lines]
        return [re.sub(r"\d+([.,]\d+)*(e[-+]\d+)?", "N", line) for line in lines]

    assert shape(shown[1]) == shape((EXAMPLE / "expected_output.txt").read_text())


def test_the_weights_went_all_the_way(shown: tuple[Path, str]) -> None:
    output, _ = shown
    for name, steps in (("ar_hf", 30), ("adapted_hf", STEPS)):
        parity = json.loads((output / name / "parity.json").read_text())
        assert parity["maximum_difference"] <= 1e-5
        assert f"| step | {steps} |" in (output / name / "README.md").read_text()
    config = json.loads((output / "adapted_hf" / "config.json").read_text())
    assert config["objective_kind"] == "masked"
    for name in ("adapted", "scratch"):
        assert latest(output / name) == STEPS
        assert max(metrics(output / name, "valid")) == STEPS
    # Both runs see the same noise; what differs are the weights they begin with.
    first = [metrics(output / name)[1]["nelbo"] for name in ("adapted", "scratch")]
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_what_it_did_is_in_its_log(shown: tuple[Path, str]) -> None:
    log = (shown[0] / "log.txt").read_text()
    assert "as qwen3" in log
    assert "continuing from" in log
    assert "as megatron_dlm" in log
