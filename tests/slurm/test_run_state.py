"""How far a run is, and what is left of it, from its files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stub_run import flags

from megatron_dlm.checkpoint.retention import write_manifest
from megatron_dlm.config.parse import dump, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.launch.slurm.follow import watch
from megatron_dlm.launch.slurm.progress import newest_reports, remaining_seconds
from megatron_dlm.launch.slurm.run_state import RunState, run_state
from megatron_dlm.training.status import write_status


def config_of(run: Path, **changes: Any) -> RunConfig:
    own = [flag for flag in flags(run, **changes) if not flag.startswith("--slurm")]
    return parse(RunConfig, own, "x")


def make_run(run: Path, config: RunConfig, *, steps: int, checkpoints: list[int]) -> None:
    """What the trainer leaves: its config, the steps it counted, and checkpoints."""
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    (run / "run.json").write_text(json.dumps({"steps": steps}))
    for step in checkpoints:
        folder = run / "checkpoints" / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"123")
        write_manifest(folder, {})


def test_states_of_a_run_with_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(run)
    assert run_state(run) == RunState("new", 0, None)
    assert run_state(run, config) == RunState("new", 0, 20)
    make_run(run, config, steps=20, checkpoints=[])
    assert run_state(run) == RunState("unfinished", 0, 20)
    make_run(tmp_path / "b", config, steps=20, checkpoints=[5, 20])
    assert run_state(tmp_path / "b") == RunState("finished", 20, 20)
    longer = config_of(run, train__steps=30)
    assert run_state(tmp_path / "b", longer) == RunState("unfinished", 20, 30)
    # The last one is not whole: the run is back at step 5.
    (tmp_path / "b" / "checkpoints" / "iter_0000020" / "weights").write_bytes(b"12")
    assert run_state(tmp_path / "b") == RunState("unfinished", 5, 20)


def test_tokens_and_epochs(tmp_path: Path) -> None:
    tokens = config_of(tmp_path, train__steps=None, train__tokens=8 * 128 * 7 - 1)
    assert tokens.train.global_batch_size * tokens.model.seq_length == 8 * 128
    assert run_state(tmp_path / "none", tokens).num_steps == 7
    epochs = config_of(tmp_path, train__steps=None, train__epochs=2.5)
    assert run_state(tmp_path / "none", epochs) == RunState("new", 0, None)
    make_run(tmp_path / "run", epochs, steps=9, checkpoints=[9])
    assert run_state(tmp_path / "run", epochs) == RunState("finished", 9, 9)
    more = config_of(tmp_path, train__steps=None, train__epochs=3)
    assert run_state(tmp_path / "run", more) == RunState("unfinished", 9, None)


def test_as_the_job_script_asks(tmp_path: Path) -> None:
    make_run(tmp_path / "run", config_of(tmp_path), steps=20, checkpoints=[5])
    command = [sys.executable, "-m", "megatron_dlm.launch.slurm.run_state"]
    run = [*command, str(tmp_path / "run")]
    answer = subprocess.run(run, capture_output=True, text=True, check=True)
    assert answer.stdout == "unfinished 5 20\nunknown\n"
    for restart, expected in (("2", "preempted SIGTERM"), ("3", "unknown")):
        environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart}
        if restart == "2":  # written by this start; the next one finds it and must not believe it
            say = "write_status(Path(sys.argv[1]), 'preempted', 9, 'SIGTERM')"
            code = f"import sys; from pathlib import Path; from {write_status.__module__} import *"
            words = [sys.executable, "-c", f"{code}; {say}", str(tmp_path / "run")]
            subprocess.run(words, env=environment, check=True)
        answer = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
        assert answer.stdout == f"unfinished 5 20\n{expected}\n"
    status = run_state(tmp_path / "run").status
    assert status is not None
    assert (status.job, status.restart, status.step) == ("7", 2, 9)
    answer = subprocess.run([*run, "no.yaml"], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("run state: error: --config no.yaml: cannot read the file")
    assert len(answer.stderr.splitlines()) == 1


def report(step: int, split: str = "train", **values: float) -> str:
    return json.dumps({"step": step, "split": split, "loss": 1.5, **values}) + "\n"


def test_newest_reports_and_the_time_that_is_left(tmp_path: Path) -> None:
    assert newest_reports(tmp_path) == {}
    speed = {"tokens": 3000.0, "tokens_per_second": 500.0}
    lines = [report(step) for step in range(1, 3000)]
    lines += [report(3000, "valid"), report(3000, **speed), '{"step": 3001, "spl']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    newest = newest_reports(tmp_path)
    assert {split: entry.step for split, entry in newest.items()} == {"valid": 3000, "train": 3000}
    # 1 token a step, 500 a second: 1,000 steps more take 2 seconds.
    assert remaining_seconds(newest["train"], 4000) == pytest.approx(2.0)
    assert remaining_seconds(newest["valid"], 4000) is None


def test_reports_are_followed_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run cuts the reports of steps that it takes again, and writes other ones."""
    from megatron_dlm.config.slurm_commands import SlurmFollowConfig
    from megatron_dlm.launch.slurm import follow
    from megatron_dlm.launch.slurm.queue import QueuedJob

    metrics = tmp_path / "metrics.jsonl"
    (tmp_path / "run.json").write_text('{"steps": 9}')
    metrics.write_text("".join(map(report, range(1, 6))))
    queue = [QueuedJob("1", 1, "1", "RUNNING", "0:01", "1:00", "node1")]
    monkeypatch.setattr(follow, "queue_of", lambda run: queue)
    lines = watch(tmp_path, SlurmFollowConfig(str(tmp_path), 2, 0.001))
    shown = [next(lines) for _ in range(3)]
    assert shown[0] == "job 1 RUNNING node1"
    assert [line.split("  ")[0] for line in shown[1:]] == ["train step 4/9", "train step 5/9"]
    metrics.write_text("".join(map(report, range(1, 4))) + report(4, lr=1.0) + '{"half')
    assert next(lines).startswith("train step 4/9")
    queue.clear()
    assert next(lines) == "no job waits or runs; the run is unfinished at step 0"
