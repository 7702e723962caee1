"""examples/05_noise_types: all five runs start from its file, and the whole script under `slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ended, metrics

from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import prepare

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "05_noise_types"
NOISE_TYPES = ("masked", "low_uniform", "balanced", "high_uniform", "uniform")


@pytest.mark.parametrize("noise", NOISE_TYPES)
def test_the_runs_are_possible(
    noise: str, short_quickstart: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_quickstart[0])
    flags = ["--config", str(EXAMPLE / "toy.yaml"), "--objective.noise_type", noise]
    assert prepare(parse(RunConfig, flags, prog="train")).objective.noise_type == noise


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
        "RANKS": "1",
    }
    script = tmp_path / "05.sh"
    text = (ROOT / "examples" / "05_noise_types.sh").read_text(encoding="utf-8")
    script.write_text(text.replace('cd "$(dirname "$0")/.."', f"cd {tmp_path}"))
    command = ["bash", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    table = ended.stdout.partition("last NELBO")[2].splitlines()[1:6]
    shown = {line.split()[0]: float(line.split()[1]) for line in table}
    assert shown.keys() == set(NOISE_TYPES)
    for noise, last in shown.items():
        assert last == pytest.approx(
            metrics(tmp_path / "out" / noise, "valid")[30]["nelbo"], abs=1e-4
        )
    assert (tmp_path / "out" / "nelbo.png").stat().st_size > 10_000
