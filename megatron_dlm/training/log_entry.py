"""One report of a run, and how it reads as a line of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# name -> (label, format): what a line shows, in this order; everything else is in metrics.jsonl.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "nelbo": ("nelbo", "{:.4f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "lr": ("lr", "{:.2e}"),
    "epoch": ("epoch", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
}


@dataclass(frozen=True)
class LogEntry:
    """What was measured at one step; `split` is train or valid."""

    step: int
    split: str
    values: Mapping[str, float]

    def line(self, total_steps: int) -> str:
        """The entry in one line, the main values only."""
        shown = [
            f"{label} {form.format(self.values[name])}"
            for name, (label, form) in _SHOWN.items()
            if name in self.values
        ]
        return f"{self.split} step {self.step}/{total_steps}  " + "  ".join(shown)


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
