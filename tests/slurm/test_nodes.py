"""GPUs, nodes that are not fit, and containers; what is not on this machine are scripts on PATH."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from minislurm import MiniSlurm, path_of
from stub_run import StubRun

ON_GPUS = {
    "train__device": "auto",
    "slurm__nodes": 1,
    "slurm__ranks_per_node": 2,
    "slurm__python": sys.executable,
}


Runs = dict[str, tuple[StubRun, int]]


@pytest.fixture(scope="module")
def runs(on_slurm: MiniSlurm, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All of them at once, each with a program of its own before all others on PATH."""
    folder = tmp_path_factory.mktemp("runs")
    runs: Runs = {}

    def submit(name: str, program: str, script: str, **changes: Any) -> None:
        path = folder / f"{name}_programs" / program
        path.parent.mkdir()
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        setup = folder / f"{name}.sh"
        setup.write_text(f"export PATH={path.parent}:$PATH\n")
        run = StubRun(folder / name, checkout, on_slurm)
        runs[name] = run, run.submit(slurm__site_setup=setup, **changes)

    # Whatever node the job gets first has lost a GPU, and counts memory errors on the other.
    script = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then echo 3; else printf "0\\n0\\n"; fi'
    submit("unfit", "nvidia-smi", script, **ON_GPUS)
    broken = "echo broken; exit 9"
    submit("all_unfit", "nvidia-smi", broken, **ON_GPUS, slurm__max_crashes=1)
    submit("full", "true", "", slurm__minimum_free_gb=10**6)
    calls = f"{folder}/$(basename $0).calls"
    script = f'echo "$@" >> {calls}; shift 7; exec "$@"'
    image = {"slurm__container": "apptainer", "slurm__image": "/images/x.sif"}
    image |= {"slurm__mounts": ["/cache:/root/.cache"]}
    submit("apptainer", "apptainer", script, **image, **ON_GPUS)
    # The flags are those of pyxis' plugin of srun, which this srun does not have.
    script = f"""
for word; do
  case $word in
    --container-* | --no-container-*) echo "$word" >> {calls} ;;
    *) others+=("$word") ;;
  esac
done
exec {path_of("srun")} "${{others[@]}}"
"""
    image = {"slurm__container": "pyxis", "slurm__image": "/images/x.sqsh"}
    submit("pyxis", "srun", script, **image, **ON_GPUS)
    return runs


def end_of(runs: Runs, name: str) -> tuple[StubRun, int, dict[str, str]]:
    """The run, its job, and how the job ended."""
    run, job = runs[name]
    return run, job, run.cluster.wait(job)


def test_unfit_node_is_left_to_others(runs: Runs) -> None:
    run, job, facts = end_of(runs, "unfit")
    log = run.log(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    first = facts["ExcNodeList"]
    assert {first, facts["NodeList"]} == {"node1", "node2"}
    assert f"BAD {first} 1 GPUs of 2 answer; uncorrected ECC errors" in log
    assert run.seen(job) == [], "training did not start on it"
    environments = [rank["environment"] for rank in run.seen(job, restart=1)]
    assert [seen["CUDA_VISIBLE_DEVICES"] for seen in environments] == ["0,1", "0,1"]
    assert [seen["SLURM_LOCALID"] for seen in environments] == ["0", "1"]


def test_unfit_nodes_everywhere_end_the_job(runs: Runs) -> None:
    run, job, facts = end_of(runs, "all_unfit")
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0")
    assert "nvidia-smi fails: broken" in run.log(job)
    assert "giving up: unfit nodes in 1 starts" in run.log(job)
    assert [line[0] for line in run.crashes()] == ["unfit_at_0"]


def test_full_disk_is_seen_before_the_start(runs: Runs) -> None:
    run, job, facts = end_of(runs, "full")
    assert facts["ExitCode"] == "2:0"
    assert f"GB free in {run.directory}, MINIMUM_FREE_GB is 1000000" in run.log(job)


def test_apptainer(runs: Runs) -> None:
    run, job, facts = end_of(runs, "apptainer")
    assert facts["JobState"] == "COMPLETED", run.log(job)
    calls = (run.directory.parent / "apptainer.calls").read_text().splitlines()
    assert len(calls) == 4, "the state twice, and two ranks"
    training = [call for call in calls if " megatron_dlm train " in call]
    assert len(training) == 2
    data = Path("shards").resolve()
    submission = run.directory / "slurm" / "submission_001"
    for call in training:
        words = call.split()
        assert words[:3] == ["exec", "--nv", "--bind"]
        for folder in (run.directory, submission / "code", data):
            assert f"{folder}:{folder}" in words[3].split(",")
        assert "/cache:/root/.cache" in words[3].split(",")
        assert words[6:8] == ["/images/x.sif", sys.executable]


def test_pyxis(runs: Runs) -> None:
    run, job, facts = end_of(runs, "pyxis")
    assert facts["JobState"] == "COMPLETED", run.log(job)
    calls = (run.directory.parent / "srun.calls").read_text().splitlines()
    assert calls.count("--container-image=/images/x.sqsh") == 3, "the state twice, and training"
    assert calls.count("--no-container-mount-home") == 3
    assert calls[1].startswith("--container-mounts=")
    assert f"{run.directory}:{run.directory}" in calls[1]
