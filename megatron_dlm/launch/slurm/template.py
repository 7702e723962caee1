"""Fills in a job script: `#SBATCH --name=value` lines and `NAME=value` knobs, nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

_END_OF_KNOBS = "# --- End of the knobs"


def fill(
    template: str, options: Mapping[str, str | None], knobs: Mapping[str, str | Sequence[str]]
) -> str:
    """The script with the given options of sbatch and knobs in place of its own.

    An option without a value (None) is taken out, one that the template lacks is added. Raises
    ValueError for a knob that the template does not have.
    """
    lines = template.splitlines()
    for name, value in options.items():
        lines = _with_option(lines, name, value)
    for name, knob in knobs.items():
        lines = _with_knob(lines, name, knob)
    return "\n".join(lines) + "\n"


def _with_option(lines: list[str], name: str, value: str | None) -> list[str]:
    pattern = re.compile(rf"#SBATCH --{re.escape(name)}(=|\s|$)")
    places = [place for place, line in enumerate(lines) if pattern.match(line)]
    kept = [line for line in lines if not pattern.match(line)]
    if value is None:
        return kept
    others = [place for place, line in enumerate(kept) if line.startswith("#SBATCH ")]
    place = places[0] if places else (others[-1] + 1 if others else 1)
    new = f"#SBATCH --{name}={_quoted(value)}" if value else f"#SBATCH --{name}"
    return [*kept[:place], new, *kept[place:]]


def _quoted(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value


def _with_knob(lines: list[str], name: str, value: str | Sequence[str]) -> list[str]:
    end = next(
        (place for place, line in enumerate(lines) if line.startswith(_END_OF_KNOBS)), len(lines)
    )
    for place in range(end):
        if lines[place].startswith(f"{name}="):
            written = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
            return [*lines[:place], f"{name}={written}", *lines[place + 1 :]]
    raise ValueError(
        f"slurm.template has no line {name}=... among its knobs, which end at a line "
        f"`{_END_OF_KNOBS}`; start from slurm/pretrain.sbatch"
    )
