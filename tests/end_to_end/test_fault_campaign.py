"""A small campaign of `tools/fault_campaign.py`: killed runs end like a run that nobody touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_campaign import Failure, _check_end, _compare
from fault_runs import SCENARIOS, Job, Kill, processes_of

TOOL = Path(__file__).parents[2] / "tools" / "fault_campaign.py"


def campaign(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), "--output_dir", str(directory), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=3000,
        check=False,
    )


def test_a_few_kills(tmp_path: Path) -> None:
    answer = campaign(tmp_path, "--kills", "2", "--kills_per_run", "2", "--seed", "3")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    record = json.loads((tmp_path / "campaign.json").read_text())
    assert len(record["kills"]) == 2
    assert record["failures"] == []


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    answer = campaign(tmp_path, "--kills", "100", "--seed", "4")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_wrong_number_is_noticed(tmp_path: Path) -> None:
    line = '{{"step":1,"split":"train","loss":{},"tokens_per_second":{}}}\n'
    for name, loss, speed in (("a", 3.0, 10), ("b", 3.0000000001, 10), ("c", 3.0, 11)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(line.format(loss, speed))
    with pytest.raises(Failure, match=r"\(1, 'train'\): .* instead of"):
        _compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="no whole checkpoint"):  # the metrics are equal
        _compare(tmp_path / "a", tmp_path / "c")


def test_ends_that_break_a_promise(tmp_path: Path) -> None:
    job = Job(SCENARIOS[0], tmp_path, [])
    stop, kill = Kill("dp2", "step", "TERM", "one"), Kill("dp2", "step", "KILL", "one")
    _check_end(stop, [0, 0], job)
    _check_end(kill, [-9, 1], job)
    _check_end(Kill("dp2", "start", "TERM", "all"), [-15, 0], job)
    _check_end(Kill("dp2", "start", "TERM", "one"), [-15, 2], job)
    with pytest.raises(Failure, match="a stop must end with 0"):
        _check_end(stop, [0, 1], job)
    with pytest.raises(Failure, match="a rank was still there"):
        _check_end(kill, [-9, None], job)


def test_a_process_that_outlives_its_rank_is_noticed(tmp_path: Path) -> None:
    orphan = "import os, time\nif os.fork() == 0:\n    time.sleep(100)"
    rank = subprocess.Popen([sys.executable, "-c", orphan], start_new_session=True)
    assert rank.wait(60) == 0
    job = Job(SCENARIOS[0], tmp_path, [], _children=[rank.pid])
    (left,) = processes_of([rank.pid])
    assert job.survivors(0.1)[0].startswith(f"{left} (")
    assert job.survivors(10) == []
