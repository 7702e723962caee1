"""pretrain.sbatch on a real Slurm: runs end, are preempted, crash and go on.

All runs are submitted together and looked at one by one: a job waits 6 s before it starts again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from minislurm import MiniSlurm
from stub_run import StubRun

from megatron_dlm.launch.slurm.status import describe

LONG = {"train__steps": 60}


class Campaign:
    """Runs by name, each with the number of its job."""

    def __init__(self, folder: Path, checkout: Path, cluster: MiniSlurm) -> None:
        self._folder, self._checkout, self._cluster = folder, checkout, cluster
        self.jobs: dict[str, int] = {}

    def run(self, name: str) -> StubRun:
        return StubRun(self._folder / name, self._checkout, self._cluster)

    def end(self, name: str) -> tuple[StubRun, int, dict[str, str]]:
        """The run, its job, and how the job ended."""
        return self.run(name), self.jobs[name], self._cluster.wait(self.jobs[name])


@pytest.fixture(scope="module")
def campaign(
    on_slurm: MiniSlurm, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Campaign:
    folder = tmp_path_factory.mktemp("runs")
    campaign = Campaign(folder, checkout, on_slurm)

    def submit(name: str, *, plan: dict[str, object], **changes: object) -> StubRun:
        run = campaign.run(name)
        run.plan(**plan)
        campaign.jobs[name] = run.submit(**changes)
        return run

    setup = folder / "site.sh"
    setup.write_text("export SITE_WORD=ours\n")
    submit("crash", plan={"fail": [1, 7, "raise"], "step_seconds": 0.1})
    submit("loop", plan={"always": [0, 7, "kill"]}, slurm__max_crashes=2)
    submit("mistake", plan={"always": [0, 1, 2]})
    submit("late_mistake", plan={"fail": [0, 8, 2]})
    submit("whole", plan={}, slurm__nodes=1, slurm__ranks_per_node=2, slurm__site_setup=setup)
    # Last, for these must still run when the signal comes.
    preempted = submit("preempted", plan={"step_seconds": 0.2}, **LONG)
    yields = submit("yields", plan={"step_seconds": 0.3}, train__steps=40)
    preempted.wait_for_step(7)
    on_slurm.run("scancel", "--batch", "--signal=USR1", str(campaign.jobs["preempted"]))
    yields.wait_for_step(7)
    on_slurm.run("scancel", "--signal=TERM", str(campaign.jobs["yields"]))
    return campaign


def test_run_that_finishes(campaign: Campaign) -> None:
    run, job, facts = campaign.end("whole")
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0")
    assert run.steps() == list(range(1, 21))
    assert "run finished at step 20 of 20" in run.log(job).splitlines()[-1]
    seen = run.seen(job)
    ours = [rank["environment"] for rank in seen]
    assert [rank["SLURM_PROCID"] for rank in ours] == ["0", "1"]
    assert {rank["SLURM_NTASKS"] for rank in ours} == {"2"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ours}) == 1
    assert {rank["SITE_WORD"] for rank in ours} == {"ours"}
    assert {rank["OMP_NUM_THREADS"] for rank in ours} == {"4"}
    submission = run.directory / "slurm" / "submission_001"
    assert seen[0]["code"] == str(submission / "code/megatron_dlm/training/entry.py")
    assert seen[0]["argv"][1:4] == ["train", "--config", str(submission / "config.yaml")]
    logs = (run.directory / "slurm" / "logs" / f"{job}_0").glob("*_task*.log")
    assert sorted(log.name.rpartition("_")[2] for log in logs) == ["task0.log", "task1.log"]


def test_asked_to_stop_it_saves_goes_back_to_the_queue_and_on_to_the_end(
    campaign: Campaign,
) -> None:
    run, job, facts = campaign.end("preempted")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert run.steps() == list(range(1, 61)), "no step is lost, none is taken twice"
    (saved,) = {rank["step"] for rank in run.seen(job, restart=1)}
    assert 7 <= saved < 60
    assert [rank["step"] for rank in run.seen(job)] == [0, 0]
    log = run.log(job)
    assert "received USR1" in log
    assert f"run unfinished at step {saved} of 60" in log
    assert "stopped by USR1; queued again" in log
    assert log.rstrip().endswith("run finished at step 60 of 60")
    assert run.crashes() == []
    ports = {rank["environment"]["MASTER_PORT"] for rank in run.seen(job) + run.seen(job, 1)}
    assert len(ports) == 2, "another port at every start"


def test_preempted_by_term_to_the_tasks_alone(campaign: Campaign) -> None:
    """What a preemption with grace time sends on a cluster that does not send the user signal."""
    run, job, facts = campaign.end("yields")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert "stopped and saved; queued again" in run.log(job)
    assert run.steps() == list(range(1, 41))
    assert run.crashes() == []


def test_crash_of_a_rank_goes_on_from_the_last_checkpoint(campaign: Campaign) -> None:
    run, job, facts = campaign.end("crash")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    (saved,) = {rank["step"] for rank in run.seen(job, restart=1)}
    assert 5 <= saved < 20
    ((step, number, status, restart, _, *reason),) = run.crashes()
    assert (step, number, status, restart) == (str(saved), str(job), "1", "0")
    expected = "task 1 on node2 ended with status 1: RuntimeError: planned failure at step 7"
    assert " ".join(reason) == expected
    log = run.log(job)
    assert f"crash: {expected}" in log
    assert 'raise RuntimeError(f"planned failure at step {step}")' in log, "its traceback"
    assert "queued again" in log


def test_crash_loop_gives_up_with_the_status_of_the_rank(campaign: Campaign) -> None:
    run, job, facts = campaign.end("loop")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "137:0", "1")
    assert [line[2] for line in run.crashes()] == ["137", "137"]
    assert {line[0] for line in run.crashes()} == {"5"}
    assert "task 0: Killed" in " ".join(run.crashes()[0])
    last = "\n".join(describe(run.directory)).rpartition("last crash ")[2]
    assert re.match(rf"\S+, job {job} at step 5: srun ended with status \d+: .*Killed", last)
    assert "giving up: 2 crashes without progress (MAX_CRASHES is 2)" in run.log(job)


def test_error_that_wants_a_person_is_not_tried_again(campaign: Campaign) -> None:
    run, job, facts = campaign.end("mistake")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert "status 2 wants a person, so the job is not queued again" in run.log(job)
    assert run.crashes() == []


def test_such_an_error_after_progress_is(campaign: Campaign) -> None:
    """Such as a file system that was away for a minute, after days of training."""
    run, _, facts = campaign.end("late_mistake")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert [line[2] for line in run.crashes()] == ["2"]
    assert run.steps()[-1] == 20


def test_script_of_a_finished_run_ends_at_once(campaign: Campaign) -> None:
    run, _, _ = campaign.end("whole")
    job = run.submit(slurm__nodes=1)
    assert run.cluster.wait(job)["JobState"] == "COMPLETED"
    assert run.seen(job) == []
    assert "is finished at step 20 of 20" in run.log(job)
    longer = run.submit(slurm__nodes=1, train__steps=25)
    assert run.cluster.wait(longer)["JobState"] == "COMPLETED"
    assert run.steps() == list(range(1, 26)), "the same run asked for more steps goes on"
    numbers = (run.directory / "slurm" / "jobs.txt").read_text().split()
    assert numbers[1:] == [str(job), str(longer)]
    assert json.loads((run.directory / "run.json").read_text())["steps"] == 25
