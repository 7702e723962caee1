"""What a figure of a study has written, and what there is to say about it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.figures.scales import short_tick


@dataclass(frozen=True)
class Drawn:
    """One figure: its files, a small table, and sentences for the reader."""

    files: tuple[Path, ...]
    """stem.png, stem.svg, and stem.csv with the numbers drawn and their intervals."""
    title: str
    header: tuple[str, ...]
    """Of the small table, for the console and the page."""
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    """Smoothing, seeds, what is a bound and what is exact: whole sentences."""

    def without_empty_columns(self) -> Drawn:
        """The small table without what no row has, such as panels where there is one."""
        kept = [place for place in range(len(self.header)) if any(row[place] for row in self.rows)]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        return replace(self, header=tuple(self.header[place] for place in kept), rows=rows)


def write_numbers(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[float | int | str | None]]
) -> Path:
    """The numbers of a figure as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
    return path


def in_short(value: float, digits: int = 3) -> str:
    """0.0123, 999, 8,192, 12.3M: whole numbers of steps and epochs with all their digits.

    Others have `digits`, and powers of ten as on an axis.
    """
    if 1000 <= abs(float(f"{value:.{digits}g}")) < 1e7:
        return f"{value:,.{max(0, digits - 4)}f}"
    text = f"{value:.{digits}g}"
    return short_tick(value, digits) if "e" in text else text
