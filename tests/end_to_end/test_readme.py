"""The commands of the README, copied from the page; training runs are shortened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import Ended, start
from shell_blocks import commands, own_arguments

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "train": ["--train.steps=4", "--schedule.warmup_steps=1", "--validation.interval_steps=4"],
}


@pytest.fixture
def checkout(short_quickstart: tuple[Path, Ended], tmp_path: Path) -> Path:
    """What the page speaks of, after `make quickstart`."""
    made, ended = short_quickstart
    assert ended.code == 0, ended.errors
    shutil.copy(ROOT / "README.md", tmp_path)
    for source in (ROOT / "docs", ROOT / "examples", made / "quickstart"):
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path


@pytest.mark.timeout(900)
def test_commands_run_as_shown(checkout: Path) -> None:
    run = []
    for number, words in enumerate(commands((ROOT / "README.md").read_text(encoding="utf-8"))):
        arguments = own_arguments(words)
        if arguments is None:
            continue
        flag = "--nproc-per-node"
        num_ranks = int(words[words.index(flag) + 1]) if flag in words else 1
        flags = SHORT.get(arguments[0], [])
        if arguments[0] == "train":  # each from its first step
            flags = [*flags, f"--train.output_dir=runs/{number}"]
        log = checkout / f"log_{number}"
        job = start([*arguments, *flags], log, num_ranks=num_ranks, imports=True)
        ended = job.end()
        assert ended.code == 0, f"{words}\n{ended.errors}"
        run.append((arguments[0], num_ranks))
    names = ["study", "tokenizer", "preprocess", "plan", "train", "train", "data", "data"]
    names += ["export", "import", "generate", "evaluate"]
    assert [name for name, _ in run] == names
    assert [num_ranks for name, num_ranks in run if name == "train"] == [1, 4]
    assert (checkout / "models" / "masked" / "parity.json").exists()
    assert (checkout / "runs" / "adapted" / "imported.yaml").exists()
