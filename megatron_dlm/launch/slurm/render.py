"""`megatron-dlm slurm render`: everything that the job of a run needs, in one folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.parse import dump
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.slurm_commands import SlurmConfig, SlurmRenderConfig
from megatron_dlm.config.validate import check
from megatron_dlm.launch.slurm.shape import JobShape, job_shape, warnings
from megatron_dlm.launch.slurm.template import fill
from megatron_dlm.runtime.files import write_whole

CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Submission:
    """A folder that holds a job script and all that it runs."""

    folder: Path
    shape: JobShape

    @property
    def script(self) -> Path:
        """The job script."""
        return self.folder / "job.sbatch"


def render(config: SlurmRenderConfig) -> None:
    """Write the submission and say how to submit it."""
    submission = write_submission(config)
    print(f"submit it with: sbatch {submission.script}")


def write_submission(
    config: SlurmRenderConfig, *, checkout: Path = CHECKOUT, on_stop: str = "requeue"
) -> Submission:
    """Check the run, and write script, configuration and code into a new submission_N folder.

    `on_stop`: what the job does when it saved before the end, requeue or exit. Raises ValueError
    for a run that cannot start on the nodes asked for, or a template that does not fit.
    """
    slurm, run = config.slurm, _absolute(resolve(_run_of(config)))
    if run.train.resume == "never":
        raise ValueError(
            "train.resume is never: every start of the job would begin anew; remove it, and move "
            f"an older run in {run.train.output_dir} away by hand"
        )
    shape = job_shape(run, slurm)
    check(run, shape.num_ranks)
    template = _template(slurm, checkout)
    run_directory = Path(run.train.output_dir)
    name = job_name(slurm, run_directory)
    folder = _new_folder(run_directory / "slurm")
    script = fill(
        template,
        _options(slurm, shape, run, name),
        {
            **_knobs(slurm, run, folder),
            "ON_STOP": on_stop,
            "RANKS_PER_NODE": str(shape.ranks_per_node),
        },
    )
    write_whole(folder / "config.yaml", dump(run))
    copy_code(checkout, folder / "code")
    submission = Submission(folder, shape)
    write_whole(submission.script, script)
    mode = submission.script.stat().st_mode
    submission.script.chmod(mode | (mode & 0o444) >> 2)  # who may read it may run it
    kind = "ranks" if run.train.device == "cpu" else "GPUs"
    print(f"{submission.script}: job {name}, {shape.nodes} nodes * {shape.ranks_per_node} {kind}")
    for warning in warnings(run, slurm, shape):
        print(f"warning: {warning}")
    return submission


def job_name(slurm: SlurmConfig, run_directory: Path) -> str:
    """The name of the job: of two runs only by accident the same, of one run always."""
    digest = hashlib.sha256(os.fsencode(run_directory)).hexdigest()
    return slurm.job_name or f"{run_directory.name}-{digest[:6]}"


def copy_code(checkout: Path, target: Path) -> None:
    """What a job needs of a checkout, so that later edits do not reach it."""
    for name in ("megatron_dlm", "slurm"):
        shutil.copytree(
            checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    if shutil.which("git"):
        answer = subprocess.run(git, capture_output=True, text=True, check=False)
        (target / "commit.txt").write_text(answer.stdout or "unknown\n", encoding="utf-8")


def _run_of(config: RunConfig) -> RunConfig:
    """The sections of a run alone."""
    return RunConfig(**{item.name: getattr(config, item.name) for item in fields(RunConfig)})


def _absolute(config: RunConfig) -> RunConfig:
    """The job may start in any folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    data, train = config.data, config.train
    data = replace(
        data,
        train={absolute(prefix): weight for prefix, weight in data.train.items()},
        valid={absolute(prefix): weight for prefix, weight in data.valid.items()},
        tokenizer=data.tokenizer and absolute(data.tokenizer),
    )
    return replace(config, data=data, train=replace(train, output_dir=absolute(train.output_dir)))


def _template(slurm: SlurmConfig, checkout: Path) -> str:
    if not (checkout / "slurm" / "job.sh").is_file():
        raise ValueError(
            f"{checkout} is no source checkout (it has no slurm/job.sh); run this command from an "
            "environment where the checkout is installed with `pip install -e`"
        )
    path = Path(slurm.template) if slurm.template else checkout / "slurm" / "pretrain.sbatch"
    return path.read_text(encoding="utf-8")


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(old.name.split("_")[1]) for old in parent.glob("submission_[0-9]*")]
    folder = parent / f"submission_{max(numbers, default=0) + 1:03d}"
    folder.mkdir()
    return folder


def _options(
    slurm: SlurmConfig, shape: JobShape, run: RunConfig, name: str
) -> dict[str, str | None]:
    """Options of sbatch; None where the template's is to go."""
    tasks = 1 if slurm.launcher == "torchrun" else shape.ranks_per_node
    cpus = slurm.cpus_per_rank * (shape.ranks_per_node // tasks)
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    gpus = None if run.train.device == "cpu" else f"{kind}{shape.ranks_per_node}"
    options: dict[str, str | None] = {
        "job-name": name,
        "nodes": str(shape.nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": gpus,
        "cpus-per-task": str(cpus),
        "mem": slurm.memory,
        "exclusive": "" if slurm.exclusive else None,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.save_seconds}",
        "output": f"{run.train.output_dir}/slurm/%x-%j.out",
    }
    if slurm.partition is not None:
        options["partition"] = slurm.partition
    if slurm.account is not None:
        options["account"] = slurm.account
    for option in slurm.options:
        key, _, value = option.removeprefix("--").partition("=")
        options[key] = value
    return options


def _knobs(slurm: SlurmConfig, run: RunConfig, folder: Path) -> dict[str, str | list[str]]:
    is_bare = slurm.container == "none"
    here = sys.prefix if is_bare and sys.prefix != sys.base_prefix else ""
    prefixes = [*run.data.train, *run.data.valid, *filter(None, [run.data.tokenizer])]
    places = sorted({os.path.dirname(prefix) for prefix in prefixes})
    return {
        "CONFIG": [str(folder / "config.yaml")],
        "RUN_DIR": run.train.output_dir,
        "CODE": str(folder / "code"),
        "VENV": slurm.venv or here,
        "CONTAINER": slurm.container,
        "IMAGE": slurm.image or "",
        "CONTAINER_MOUNTS": ",".join([*(f"{place}:{place}" for place in places), *slurm.mounts]),
        "PYTHON": slurm.python,
        "SITE_SETUP": os.path.abspath(slurm.site_setup) if slurm.site_setup else "",
        "LAUNCHER": slurm.launcher,
        "THREADS_PER_RANK": str(slurm.threads_per_rank),
        "MAX_CRASHES": str(slurm.max_crashes),
        "MINIMUM_FREE_GB": str(slurm.minimum_free_gb),
    }
