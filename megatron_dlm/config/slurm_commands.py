"""Configuration of the `megatron-dlm slurm` commands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require, require_positive
from megatron_dlm.config.schema import RunConfig

# As sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, each of them after days-.
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class SlurmConfig:
    """The job that trains a run. Ranks: nodes * ranks_per_node."""

    nodes: int | None = None
    """Nodes of the job; default: as few as data_parallel_size copies of the model need."""
    ranks_per_node: int = 8
    """Ranks of a full node, one per GPU; with train.device cpu: processes of a node."""
    data_parallel_size: int | None = None
    """Copies of the model (TP * PP * CP ranks each); default: what fills the nodes, else 1."""
    cpus_per_rank: int = 8
    """Cores of each rank."""
    gpu_type: str | None = None
    """Kind of GPU to ask for, as the cluster names it (h100)."""
    memory: str = "0"
    """Memory of a node, as sbatch takes it; 0: all of it."""
    exclusive: bool = True
    """Share the nodes with no other job."""
    time: str = "24:00:00"
    """Time limit of one job; the run goes on in the next one."""
    save_seconds: int = 600
    """Ask the run to save this long before the time limit: more than a step and a save take."""
    partition: str | None = None
    """Partition; default: the cluster's."""
    account: str | None = None
    """Account to charge; default: yours."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as qos=high or constraint=ib."""
    job_name: str | None = None
    """Two jobs of one name never run at once; default: the name of train.output_dir."""
    template: str | None = None
    """Script to fill in; default: slurm/pretrain.sbatch of the source checkout."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun: one task per rank; torchrun: one task per node, which starts its ranks."""
    venv: str | None = None
    """Environment to activate on the nodes; default: the one of this command, none in a
    container."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What runs the image: pyxis (srun --container-image) or apptainer."""
    image: str | None = None
    """Container image: a .sqsh file for pyxis, a .sif file for apptainer."""
    mounts: list[str] = field(default_factory=list)
    """Further folders to see in the container, FROM:TO; those of the run and its data are seen."""
    python: str = "python"
    """Python on the nodes or in the container."""
    site_setup: str | None = None
    """File of shell lines that the job reads first: module load, NCCL_SOCKET_IFNAME, proxies."""
    threads_per_rank: int = 4
    """Threads of each rank on the CPU."""
    max_crashes: int = 3
    """Give up after this many crashes without a new checkpoint between them."""
    minimum_free_gb: int = 20
    """Do not start with less free space in train.output_dir; a checkpoint takes up to 16 bytes for
    each parameter."""

    def __post_init__(self) -> None:
        sizes = {
            "ranks_per_node": self.ranks_per_node,
            "cpus_per_rank": self.cpus_per_rank,
            "save_seconds": self.save_seconds,
            "threads_per_rank": self.threads_per_rank,
            "max_crashes": self.max_crashes,
        }
        optional = {"nodes": self.nodes, "data_parallel_size": self.data_parallel_size}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        require_positive("slurm", sizes)
        require(
            self.save_seconds < self.time_seconds,
            f"slurm.save_seconds {self.save_seconds} is not below the time limit slurm.time "
            f"{self.time}",
        )
        require(
            (self.container == "none") == (self.image is None),
            f"slurm.container is {self.container} and slurm.image is {self.image}; give both or "
            "none",
        )
        for mount in self.mounts:
            require(":" in mount, f"slurm.mounts has {mount}; it must be FROM:TO")

    @property
    def time_seconds(self) -> int:
        """The time limit; ValueError where sbatch would not understand it."""
        match = _TIME.fullmatch(self.time)
        if match is None:
            raise ValueError(
                f"slurm.time is {self.time}; it must be minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds"
            )
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match.group(1) is not None:  # days-hours[:minutes[:seconds]]
            return ((days * 24 + first) * 60 + second) * 60 + third
        if match.group(4) is not None:
            return (first * 60 + second) * 60 + third
        return first * 60 + second


@dataclass(frozen=True)
class SlurmRenderConfig(RunConfig):
    """Write the job script of a run, with its resolved configuration and a copy of the code, into
    a new folder train.output_dir/slurm/submission_N; nothing is submitted."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class ChainConfig:
    """How a run longer than the time limit goes on."""

    jobs: int = 1
    """Jobs to submit, each of which goes on where the one before it saved; 1: a single job that
    is queued again by itself."""
    kind: Literal["dependency", "array"] = "dependency"
    """dependency: each job waits for the end of the one before; array: tasks, one at a time."""
    after: int | None = None
    """Wait for the end of this job first."""

    def __post_init__(self) -> None:
        require_positive("chain", {"jobs": self.jobs})


@dataclass(frozen=True)
class SlurmSubmitConfig(SlurmRenderConfig):
    """Write the job script of a run and submit it, as one job or as a chain of jobs."""

    chain: ChainConfig = field(default_factory=ChainConfig)


@dataclass(frozen=True)
class SlurmStatusConfig:
    """Jobs, step, loss and remaining time of runs."""

    run: list[str]
    """Run directories."""

    def __post_init__(self) -> None:
        require(bool(self.run), "run is empty; name at least one run directory")


@dataclass(frozen=True)
class SlurmFollowConfig:
    """Show the metrics of a run as they are reported, until its jobs have ended."""

    run: str
    """Run directory."""
    num_reports: int = 10
    """Show this many older reports first."""
    interval_seconds: float = 5.0
    """Look for news this often."""

    def __post_init__(self) -> None:
        require_positive("follow", {"interval_seconds": self.interval_seconds})
        require(self.num_reports >= 0, f"num_reports is {self.num_reports}; it must be at least 0")


@dataclass(frozen=True)
class SlurmCancelConfig:
    """End the jobs of a run: those that wait at once, those that run after they have saved."""

    run: str
    """Run directory."""
    save_seconds: float = 600.0
    """A job that has not saved and ended after this time is killed."""

    def __post_init__(self) -> None:
        require_positive("cancel", {"save_seconds": self.save_seconds})
