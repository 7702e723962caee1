"""A small campaign of `tools/fuzz_inputs.py`: damaged inputs end in success or in one line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from forked_command import Outcome
from fuzz_inputs import _judge
from fuzz_mutations import damaged

TOOLS = Path(__file__).parents[2] / "tools"


def fuzz(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / "fuzz_inputs.py"), "--output_dir", str(directory), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=3000,
        check=False,
    )


def test_a_few_of_every_kind(tmp_path: Path) -> None:
    answer = fuzz(tmp_path, "--mutations", "20", "--seed", "7")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    trials = json.loads((tmp_path / "summary.json").read_text())["trials"]
    assert len(trials) == 20
    assert {trial["verdict"] for trial in trials} == {"accepted", "refused"}
    assert len({trial["target"] for trial in trials}) == 10


@pytest.mark.slow
def test_a_thousand(tmp_path: Path) -> None:
    answer = fuzz(tmp_path, "--mutations", "1000", "--seed", "8")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_bad_flags_are_one_line(tmp_path: Path) -> None:
    answer = fuzz(tmp_path, "--targets", "nothing")
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "targets: nothing is none of configuration, jsonl" in answer.stderr


def test_every_mutation_changes_something_and_the_seed_says_what() -> None:
    text = b'{"text": "def f(x):", "number": 12}\nmodel:\n  num_layers: 2\n'
    for data in (text, bytes(range(256)) * 4, b"x", b""):
        for seed in range(200):
            name, changed = damaged(data, random.Random(seed))
            assert changed != data, name
            assert damaged(data, random.Random(seed)) == (name, changed)


def test_verdicts() -> None:
    one_line = "megatron-dlm train: error: no\n"
    assert _judge(Outcome(2, "", one_line, 1.0), must_notice=True) == "refused"
    assert _judge(Outcome(2, "", one_line * 2, 1.0), must_notice=True) == "talkative"
    assert _judge(Outcome(0, "", "", 1.0), must_notice=True) == "silent"
    assert _judge(Outcome(0, "", "", 1.0), must_notice=False) == "accepted"
    assert _judge(Outcome(None, "", "", 60.0), must_notice=False) == "hang"
    assert _judge(Outcome(-11, "", "", 1.0), must_notice=False) == "crash"
    traceback = "Traceback (most recent call last):\n"
    assert _judge(Outcome(1, "", traceback, 1.0), must_notice=False) == "traceback"
