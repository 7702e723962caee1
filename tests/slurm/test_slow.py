"""What takes a minute or needs torch: the real trainer, a true time limit, a true preemption."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from command_line import arguments, assert_same_curves, metrics
from minislurm import MiniSlurm
from stub_run import StubRun
from tiny_corpus import TinyCorpus

from megatron_dlm.config.parse import parse
from megatron_dlm.config.slurm_commands import SlurmSubmitConfig
from megatron_dlm.launch.slurm.queue import ask_to_save
from megatron_dlm.launch.slurm.render import CHECKOUT
from megatron_dlm.launch.slurm.submit import submit_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_JOB = {"nodes": 1, "ranks_per_node": 2, "cpus_per_rank": 1, "memory": 4000, "minimum_free_gb": 1}
_JOB |= {"exclusive": "false", "threads_per_rank": 1}


def submit_training(corpus: TinyCorpus, run: StubRun, launcher: str) -> int:
    settings = {"train__steps": 120, "schedule__kind": "constant", "checkpoint__keep_last": 2}
    settings |= {"checkpoint__interval_steps": 50, "validation__interval_steps": 100}
    flags = arguments(corpus, run.directory, **settings)[1:]
    flags += [f"--slurm.{name}={value}" for name, value in _JOB.items()]
    config = parse(SlurmSubmitConfig, [*flags, f"--slurm.launcher={launcher}"], "submit")
    return submit_jobs(config, checkout=CHECKOUT)[-1]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_preempted_training_ends_with_the_same_curve(
    launcher: str, on_slurm: MiniSlurm, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    whole = StubRun(tmp_path / "whole", CHECKOUT, on_slurm)
    job = submit_training(tiny_corpus, whole, launcher)
    assert on_slurm.wait(job, seconds=200)["JobState"] == "COMPLETED", whole.log(job)

    run = StubRun(tmp_path / "run", CHECKOUT, on_slurm)
    job = submit_training(tiny_corpus, run, launcher)
    run.wait_for_step(20)
    ask_to_save(job)
    facts = on_slurm.wait(job, seconds=200)
    log = run.log(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped by USR1; queued again" in log
    assert "finished at step 120 of 120" in log
    assert run.crashes() == []
    assert list(metrics(run.directory)) == list(range(1, 121))
    assert_same_curves(whole.directory, run.directory, tolerance=0)


def test_true_time_limit(on_slurm: MiniSlurm, checkout: Path, tmp_path: Path) -> None:
    """Slurm looks at limits every 30 s: asked to save 50 s before the end of a minute."""
    run = StubRun(tmp_path / "run", checkout, on_slurm)
    run.plan(step_seconds=0.5)
    job = run.submit(train__steps=100, slurm__time="1", slurm__save_seconds=50, slurm__nodes=1)
    facts = on_slurm.wait(job, seconds=200)
    assert facts["JobState"] == "COMPLETED", run.log(job)
    assert int(facts["Restarts"]) >= 1
    assert "stopped by USR1; queued again" in run.log(job)
    assert run.steps() == list(range(1, 101))


def test_true_preemption(on_slurm: MiniSlurm, checkout: Path, tmp_path: Path) -> None:
    """The tasks get TERM, save and end within the grace; the script queues the job again."""
    run = StubRun(tmp_path / "run", checkout, on_slurm)
    run.plan(step_seconds=0.1)
    job = run.submit(train__steps=60, slurm__partition="low")
    run.wait_for_step(5)
    urgent = on_slurm.submit("-N2", "--exclusive", "--wrap=sleep 3", cwd=tmp_path)
    started = time.monotonic()
    on_slurm.wait_until(lambda: on_slurm.job(urgent)["JobState"] == "RUNNING", "the urgent job")
    assert time.monotonic() - started < 60
    facts = on_slurm.wait(job, seconds=120)
    assert facts["JobState"] == "COMPLETED", run.log(job)
    assert int(facts["Restarts"]) >= 1
    assert run.steps() == list(range(1, 61))
    assert run.crashes() == []
