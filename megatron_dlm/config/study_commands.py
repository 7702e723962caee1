"""Configurations of the `study` commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require, require_fraction
from megatron_dlm.config.hardware import GPUS


@dataclass(frozen=True)
class StudyPlanConfig:
    """Expand a study into its runs, a list for slurm/sweep.sbatch, and reckon what they cost."""

    study: str
    """YAML file of the study: base, set, axes, leave_out (docs/science.md)."""
    output_dir: str
    """Folder of the study; gets study.yaml, sweep.txt and plan.json."""
    gpu: str = "H100"
    """GPU whose hours are reckoned."""
    mfu: float = 0.4
    """Share of its peak that training reaches."""

    def __post_init__(self) -> None:
        require(self.gpu in GPUS, f"gpu {self.gpu} is none of {', '.join(GPUS)}")
        require_fraction("study plan", {"mfu": self.mfu})
        require(self.mfu > 0, f"mfu is {self.mfu}; it must be greater than 0")


@dataclass(frozen=True)
class StudyRunConfig:
    """Train the runs of a study on this machine, several side by side; call again to go on."""

    study: str
    """YAML file of the study."""
    output_dir: str
    """Folder of the study; every run has its own under runs/."""
    workers: int = 0
    """Runs at the same time, one core each; 0: one per core."""
    only: list[str] = field(default_factory=list)
    """Only runs whose name has one of these texts in it."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"workers is {self.workers}; it must be at least 0")


@dataclass(frozen=True)
class StudyStatusConfig:
    """How far every run of a study is."""

    study: str
    """YAML file of the study."""
    output_dir: str
    """Folder of the study."""


@dataclass(frozen=True)
class StudyGatherConfig:
    """Collect the results of a study in one tidy table: a row for every report of every run."""

    study: str
    """YAML file of the study."""
    output_dir: str
    """Folder of the study."""
    output: str | None = None
    """Table to write, .csv or .parquet; default: results.csv in the folder of the study."""
    split: str = "valid"
    """valid, train, or all."""

    def __post_init__(self) -> None:
        require(
            self.split in ("valid", "train", "all"),
            f"split is {self.split}; it must be valid, train or all",
        )
        require(
            self.output is None or self.output.endswith((".csv", ".parquet")),
            f"output {self.output} must end in .csv or .parquet",
        )


@dataclass(frozen=True)
class StudyCrossoverConfig:
    """Where one kind of run passes below another: a table and a figure of all settings."""

    study: str
    """YAML file of the study."""
    output_dir: str
    """Folder of the study; gets crossover.csv, crossover.png and crossover.svg."""
    axis: str = "objective"
    """Axis of the study whose labels are compared."""
    first: str = "ar"
    """Label that is the lower one at the beginning."""
    second: str = "masked"
    """Label that is asked when it becomes the lower one."""
    seeds: str | None = "seed"
    """Axis of repetitions: the mean is over its labels, and the intervals come from them; null
    where there is none."""
    x: Literal["epoch", "tokens", "training_flops"] = "epoch"
    """Against what the curves are drawn and cross."""
    metric: str = "nelbo"
    """Validation metric, lower is better."""
    smoothing: float = 0.0
    """Width of a Gaussian average over the points of a curve, as a factor in x; 0: none."""
    resamples: int = 1000
    """Bootstrap resamples of the seeds."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")
        require(self.resamples > 0, f"resamples is {self.resamples}; it must be greater than 0")
        require(
            self.first != self.second,
            f"first and second are both {self.first}; compare two labels of the axis",
        )
