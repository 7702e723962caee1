"""Chains of jobs, what can be seen of them, and how they are ended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from minislurm import MiniSlurm
from stub_run import StubRun

from megatron_dlm.config.slurm_commands import (
    SlurmCancelConfig,
    SlurmFollowConfig,
    SlurmStatusConfig,
)
from megatron_dlm.launch.slurm.cancel import cancel, cancel_jobs
from megatron_dlm.launch.slurm.follow import watch
from megatron_dlm.launch.slurm.queue import ask_to_save, queue_of
from megatron_dlm.launch.slurm.run_state import RunState, run_state
from megatron_dlm.launch.slurm.status import status

LONG = {"train__steps": 2000, "slurm__nodes": 1}


@pytest.fixture
def run(on_slurm: MiniSlurm, checkout: Path, tmp_path: Path) -> StubRun:
    run = StubRun(tmp_path / "run", checkout, on_slurm)
    run.plan(step_seconds=0.1)
    return run


@pytest.mark.parametrize("kind", ["dependency", "array"])
def test_chain_goes_on_where_the_job_before_saved(kind: str, run: StubRun) -> None:
    last = run.submit(chain__jobs=3, chain__kind=kind, train__steps=30, slurm__nodes=1)
    names = (
        [last - 2, last - 1, last] if kind == "dependency" else [f"{last}_{i}" for i in (1, 2, 3)]
    )
    run.wait_for_step(3)
    first = queue_of(run.directory)[0 if kind == "dependency" else -1]
    assert first.state == "RUNNING"
    ask_to_save(first.own_number)
    config = SlurmFollowConfig(str(run.directory), num_reports=2, interval_seconds=0.1)
    shown = list(watch(run.directory, config))
    ends = [run.cluster.job(name) for name in names]
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 3
    assert run.steps() == list(range(1, 31))
    numbers = [end["JobId"] for end in ends]
    logs = [run.log(number) for number in numbers]
    assert "stopped by USR1; the next job of the chain goes on" in logs[0]
    assert "finished at step 30 of 30" in logs[1]
    assert "is finished at step 30 of 30" in logs[2]
    assert run.seen(numbers[2]) == [], "nothing was left for the third"

    assert any(line.startswith(f"job {names[1]} RUNNING node") for line in shown)
    assert "train step 30/30  loss 4.7000  tokens/s 50" in shown
    reported = [line for line in shown if line.startswith("train step ")]
    assert reported == sorted(set(reported), key=reported.index), "every report once"
    assert shown[-1] == "no job waits or runs; the run is finished at step 30"


def test_cancel_saves_first_and_ends_the_chain(
    run: StubRun, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run.submit(chain__jobs=2, **LONG)
    run.wait_for_step(3)
    status(SlurmStatusConfig([str(run.directory)]))
    shown = capsys.readouterr().out
    assert re.search(r"/run: unfinished, newest checkpoint at step \d+ of 2000\n", shown)
    assert f"  job {last - 1} RUNNING node" in shown
    assert f"  job {last} PENDING (Dependency)" in shown
    assert "  train step " in shown
    # 100 tokens a step at 50 tokens a second: two seconds for each step that is left.
    assert re.search(r"remaining 1:0\d:\d\d at this speed; last report 0:00:", shown)
    with pytest.raises(
        ValueError, match=rf"already has job {last - 1} RUNNING.*slurm cancel --run"
    ):
        run.submit(**LONG)

    cancel(SlurmCancelConfig(str(run.directory), save_seconds=60))
    shown = capsys.readouterr().out
    saved = run.steps()[-1]
    assert f"unfinished, saved at step {saved}; submit again to go on" in shown
    assert run_state(run.directory) == RunState("unfinished", saved, 2000)
    ends = [run.cluster.wait(number) for number in (last - 1, last)]
    assert [end["JobState"] for end in ends] == ["COMPLETED", "CANCELLED"]
    assert ends[0]["Restarts"] == "0"
    assert "stopped on request" in run.log(last - 1)
    status(SlurmStatusConfig([str(run.directory)]))
    assert "no job waits or runs" in capsys.readouterr().out


def test_cancelled_by_slurm_alone_it_saves_too_and_stays_cancelled(run: StubRun) -> None:
    job = run.submit(**LONG)
    run.wait_for_step(3)
    run.cluster.run("scancel", str(job))
    facts = run.cluster.wait(job)
    run.wait_for(lambda: "whether the job runs again is left to Slurm" in run.log(job))
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert run_state(run.directory).step == run.steps()[-1]


def test_deaf_job_is_killed_and_the_newest_checkpoint_named(run: StubRun) -> None:
    run.plan(step_seconds=0.1, deaf=True)
    job = run.submit(**LONG)
    run.wait_for_step(6)
    assert cancel_jobs(run.directory, save_seconds=0.5) == [str(job)]
    assert run.cluster.wait(job)["JobState"] == "CANCELLED"
    with pytest.raises(ValueError, match=r"slurm/jobs.txt: no job of this run was submitted"):
        cancel_jobs(run.directory / "other", save_seconds=1)
