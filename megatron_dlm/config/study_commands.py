"""Configurations of the `study` commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dlm.config.checks import require, require_fraction
from megatron_dlm.config.hardware import GPUS


@dataclass(frozen=True)
class StudyPlanConfig:
    """Expand a study into its runs, a list for slurm/sweep.sbatch, and reckon what they cost."""

    study: str
    """YAML file of the study (docs/science.md)."""
    output_dir: str
    """Folder of the study; gets sweep.txt and plan.json."""
    gpu: str = "H100"
    """GPU whose hours are told for every run; those of the others for all runs together."""
    mfu: float = 0.4
    """Share of its dense bf16 peak that training reaches, FLOPs as computed."""

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
    """Only runs whose name has one of these texts in it; spaces or commas between several."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"workers is {self.workers}; it must be at least 0")


@dataclass(frozen=True)
class StudyStatusConfig:
    """How far every run of a study is, and which were trained with other settings than it says."""

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
class StudyReportConfig:
    """Draw the figures of a study, and write one page with them, its runs and where they are."""

    study: str
    """YAML file of the study; figures: in it says what is drawn."""
    output_dir: str
    """Folder of the study; gets index.html and .png, .svg and .csv of every figure."""
    results: str | None = None
    """Table of `study gather`, .csv or .parquet; default: gathered now, into results.csv."""
