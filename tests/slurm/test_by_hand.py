"""pretrain.sbatch filled in by hand, as its comments say, and an edited checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from minislurm import MiniSlurm
from stub_run import StubRun, flags

from megatron_dlm.launch.slurm.template import fill


def edit_template(checkout: Path, run: Path, name: str = "pretrain") -> None:
    """The lines that a user edits, here for a partition without GPUs."""
    path = checkout / "slurm" / f"{name}.sbatch"
    options = {"nodes": "1", "ntasks-per-node": "2", "cpus-per-task": "1", "mem": "100"}
    knobs = {"CONFIG": ["my_run.yaml"], "RUN_DIR": str(run), "MINIMUM_FREE_GB": "1"}
    filled = fill(
        path.read_text(),
        {**options, "gpus-per-node": None, "exclusive": None},
        {**knobs, "VENV": "", "PYTHON": sys.executable},
    )
    path.write_text(filled)


def test_edited_checkout_does_not_change_a_requeued_run(
    on_slurm: MiniSlurm, own_checkout: Path, tmp_path: Path
) -> None:
    run = StubRun(tmp_path / "run", own_checkout, on_slurm)
    run.plan(step_seconds=0.1)
    edit_template(own_checkout, run.directory)
    config = own_checkout / "my_run.yaml"
    config.write_text("model: {vocab_size: 256}\nobjective: {mask_token_id: 255}\n")
    settings = flags(run.directory, train__steps=30)
    given = [flag for flag in settings if flag.startswith(("--train.", "--data."))]
    job = on_slurm.submit("slurm/pretrain.sbatch", *given, cwd=own_checkout)
    run.wait_for_step(3)
    (own_checkout / "megatron_dlm" / "training" / "entry.py").write_text("raise SystemExit(7)\n")
    (own_checkout / "slurm" / "training_job.sh").write_text("exit 9\n")
    config.write_text("train: {steps: 4}\n")
    on_slurm.run("scontrol", "requeue", str(job))
    facts = on_slurm.wait(job)
    log = (own_checkout / f"pretrain-{job}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert run.steps() == list(range(1, 31))
    copy = run.directory / "slurm" / str(job)
    for rank in run.seen(job) + run.seen(job, restart=1):
        assert rank["code"] == str(copy / "code/megatron_dlm/training/entry.py")
        assert rank["cwd"] == str(own_checkout), "relative paths are those of the checkout"
    assert "vocab_size: 256" in (copy / "config.yaml").read_text()
    assert "received TERM" in log
    assert (run.directory / "slurm" / "jobs.txt").read_text() == f"{job}\n"


def test_mistake_in_the_config_ends_the_job_with_its_message(
    on_slurm: MiniSlurm, own_checkout: Path, tmp_path: Path
) -> None:
    edit_template(own_checkout, tmp_path / "run")
    job = on_slurm.submit("slurm/pretrain.sbatch", cwd=own_checkout)
    facts = on_slurm.wait(job)
    log = (own_checkout / f"pretrain-{job}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: --config my_run.yaml: cannot read the file" in log
