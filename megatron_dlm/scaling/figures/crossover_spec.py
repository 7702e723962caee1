"""The keys of kind `crossover`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_dlm.config.checks import require
from megatron_dlm.scaling.figures.checks import check_axis, check_label
from megatron_dlm.scaling.figures.directions import Direction, direction_of
from megatron_dlm.scaling.figures.families import Grouping

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study


@dataclass(frozen=True)
class CrossoverSpec:
    """Keys of kind `crossover`: a panel for every setting of the axes that are not compared."""

    axis: str
    """Axis of the study whose labels are compared."""
    first: str
    """Label that is the better one at the beginning."""
    second: str
    """Label that is asked where it becomes the better one for good."""
    x: Literal["epoch", "tokens", "training_flops", "step"] = "epoch"
    """Against what the curves are drawn and cross."""
    metric: str = "nelbo"
    """Column of the validations."""
    higher_is_better: bool = False
    """Whether the metric is one like accuracy; of losses the lower one is better."""
    seeds: str | None = None
    """Axis of repetitions: intervals come from them; default: seed, where the study has it."""
    smoothing: float = 0.0
    """Width of a Gaussian average over the points of a curve before it is compared: its standard
    deviation in ln x, so 0.1 is about 10 % of x; 0: none."""
    resamples: int = 1000
    """Bootstrap resamples of the seeds."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Axis -> the labels whose settings are compared; all where it is not named."""
    x_scale: Literal["linear", "log"] = "linear"
    """Scale of the x axis."""
    highest: float | None = None
    """What lies above this is not shown in the picture; default: all is."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 0, f"smoothing is {self.smoothing}; it must be at least 0")
        require(self.resamples > 0, f"resamples is {self.resamples}; it must be greater than 0")
        require(
            self.first != self.second,
            f"first and second are both {self.first}; compare two labels of the axis",
        )
        require(self.axis != self.seeds, f"axis and seeds are both {self.axis}; name two axes")

    @property
    def direction(self) -> Direction:
        """Which values of the metric are better."""
        return direction_of(higher_is_better=self.higher_is_better)

    def check(self, study: Study) -> None:
        """Raise ValueError where the study lacks an axis or a label."""
        check_axis(study, "axis", self.axis)
        check_label(study, "first", self.axis, self.first)
        check_label(study, "second", self.axis, self.second)
        Grouping(seeds=self.seeds, only=self.only).check(study)
