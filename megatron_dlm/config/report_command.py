"""Configuration of `megatron-dlm report`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.checks import require


@dataclass(frozen=True)
class ReportConfig:
    """One HTML file with the curves, settings and events of one or several runs; opens offline."""

    run: list[str]
    """Run directories, as many as are to be compared."""
    output: str | None = None
    """File to write; default: report.html in the run directory, for several runs in this one."""
    max_points: int = 2000
    """A curve of more points is thinned to about this many; its peaks stay."""

    def __post_init__(self) -> None:
        require(bool(self.run), "run is empty; name at least one run directory")
        repeated = [name for name in self.run if self.run.count(name) > 1]
        require(not repeated, f"run names {repeated[:1]} more than once; name every run once")
        require(self.max_points >= 100, f"max_points is {self.max_points}; it must be at least 100")
