"""The two commands that compare sizes: CompleteP is flat where the standard models grow."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fork_server import run_script

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "tools" / f"{name}.py", *arguments)


def rows_of(path: Path) -> list[dict[str, str]]:
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def slopes(rows: list[dict[str, str]], column: str) -> dict[tuple[str, str, str], float]:
    """Exponent of the size in a column, by (parametrization, axis, quantity)."""
    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        key = (row["parametrization"], row["axis"], row["quantity"])
        lines.setdefault(key, []).append((float(row["size"]), float(row[column])))
    return {
        key: np.polyfit(*np.log(np.array(line)).T, 1)[0].item()
        for key, line in lines.items()
        if min(value for _, value in line) > 0  # the logits start at 0
    }


QUANTITIES = ("embedding", "attention", "mlp", "residual", "logits")


def test_coordinate_check(tmp_path: Path) -> None:
    """Measured exponents: completep within 0.06 of 0 (residual against depth -0.21)."""
    sizes = ["--widths", "64", "128", "256", "--depths", "4", "8", "16"]
    result = run_tool(
        "coordinate_check",
        f"--output_dir={tmp_path}",
        "--model.hidden_size=64",
        "--steps=3",
        *sizes,
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "coordinate_check.csv")
    assert len(rows) == 2 * 6 * len(QUANTITIES)
    change, start = slopes(rows, "change"), slopes(rows, "start")
    for quantity in QUANTITIES:
        assert abs(change["completep", "width", quantity]) < 0.15, quantity
        assert abs(change["completep", "depth", quantity]) < 0.3, quantity
    for quantity in ("attention", "mlp", "residual"):
        assert abs(start["completep", "width", quantity]) < 0.15, quantity
        assert start["standard", "width", quantity] > 0.8, quantity
        assert change["standard", "width", quantity] > 1.2, quantity
    assert change["standard", "width", "logits"] > 0.7
    assert change["standard", "depth", "residual"] > 0.7
    printed = [line for line in result.stdout.splitlines() if line.startswith("standard, width  ")]
    wanted = pytest.approx(change["standard", "width", "logits"], abs=0.006)
    assert float(printed[0].split()[-1]) == wanted


def test_learning_rate_transfer(tmp_path: Path) -> None:
    result = run_tool(
        "learning_rate_transfer",
        f"--output_dir={tmp_path}",
        *("--widths", "16", "32", "--rates", "0.01", "0.1", "1e30"),
        *("--steps=8", "--seeds", "1", "2", "--schedule.warmup_steps=2", "--model.hidden_size=16"),
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "learning_rate_transfer.csv")
    assert len(rows) == 2 * 2 * 2 * 3
    losses: dict[tuple[str, int, float], list[float]] = {}
    for row in rows:
        key = (row["parametrization"], int(row["width"]), float(row["rate"]))
        losses.setdefault(key, []).append(float(row["loss"]))
    for (parametrization, width, rate), (first, second) in losses.items():
        assert first != second, "the seeds give the same run"
        for value in (first, second):
            assert value > 100 if rate == 1e30 else 2 < value < 6, (parametrization, width)
        if rate == 0.1:
            assert sum([first, second]) < sum(losses[parametrization, width, 0.01])
    mean = np.mean(losses["completep", 32, 0.1])
    assert f"completep, width 32: 0.1 with {mean:.4f} nats" in result.stdout


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("coordinate_check", "--widths=[0]", "widths is [0]; every value must be above 0"),
        ("coordinate_check", "--widths=[48]", "width 48 is not a multiple of the heads' size 32"),
        ("coordinate_check", "--text=[missing.txt]", "missing.txt"),
        ("learning_rate_transfer", "--rates=[]", "rates is []; every value must be above 0"),
        ("learning_rate_transfer", "--steps=5", "warmup_steps is 10; it must be below steps 5"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, flag: str, message: str) -> None:
    result = run_tool(name, f"--output_dir={tmp_path}", flag)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if "error:" in line]
    assert message in line


def test_text_shorter_than_a_sample(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 65)
    flags = [f"--output_dir={tmp_path}", f"--text=[{tmp_path / 'text'}]"]
    result = run_tool("coordinate_check", *flags)
    assert result.returncode == 2
    assert "the text has 65 bytes; model.seq_length 64 needs 66" in result.stderr
