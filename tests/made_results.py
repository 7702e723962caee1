"""Made-up results tables of made-up studies, for the tests of the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.scaling.results import Results
from megatron_dlm.scaling.study import Study, StudyRun

Axes = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Axis -> label -> settings, as in a study file."""
Reports = Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]]
"""Labels and settings of a run -> its validations."""


def labels(*names: str) -> dict[str, dict[str, Any]]:
    """Labels of an axis that changes no setting."""
    return {name: {} for name in names}


def made_study(axes: Axes, reports: Reports, **facts: Any) -> tuple[Study, Results]:
    """The study of every combination, and its table; facts: columns that all rows have."""
    runs, rows = [], []
    for chosen in product(*axes.values()):
        place = dict(zip(axes, chosen, strict=True))
        name = "_".join(chosen)
        settings = {key: v for axis, label in place.items() for key, v in axes[axis][label].items()}
        runs.append(StudyRun(name=name, labels=place, settings=settings, flags=()))
        row = {"study": "made", "run": name, **place, **settings, **facts, "split": "valid"}
        rows += [{**row, **report} for report in reports({**place, **settings})]
    changed = dict.fromkeys(key for axis in axes.values() for one in axis.values() for key in one)
    study = Study(
        name="made",
        question="Is it so?",
        axes=tuple(axes),
        runs=tuple(runs),
        settings=tuple(changed),
    )
    return study, Results(tuple(rows), "results.csv")


def curve(
    values: Callable[[np.ndarray], np.ndarray], *, num_steps: int = 1600, every: int = 40
) -> list[dict[str, Any]]:
    """Validations whose nelbo is a function of the step; 4,096 tokens a step."""
    steps = np.arange(every, num_steps + 1, every)
    return [
        {"step": int(step), "tokens": int(step) * 4096, "epoch": int(step) / 8, "nelbo": float(y)}
        for step, y in zip(steps, values(steps), strict=True)
    ]


def colors_in(path: Path) -> set[str]:
    """The colours of a PNG as #RRGGBB, those of 30 pixels and more."""
    from matplotlib.image import imread

    pixels = np.round(imread(path)[..., :3] * 255).astype(int) @ (65536, 256, 1)
    found, counts = np.unique(pixels, return_counts=True)
    return {f"#{color:06X}" for color in found[counts >= 30]}
