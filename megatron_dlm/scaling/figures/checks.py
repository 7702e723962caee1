"""What the keys of figures say about the axes of a study, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.config.keys import suggestion

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

_SEEDS = "seed"


def check_axis(study: Study, key: str, axis: str | None) -> None:
    """Raise ValueError if the study has no such axis; None is none."""
    if axis is not None and axis not in study.axes:
        raise ValueError(
            f"{key} {axis} is no axis of {study.name}{suggestion(axis, study.axes)} "
            f"(have: {', '.join(study.axes)})"
        )


def check_label(study: Study, key: str, axis: str, label: str) -> None:
    """Raise ValueError if no run of the study has the label."""
    labels = study.labels_of(axis)
    if label not in labels:
        raise ValueError(f"{key} {label} is no label of {axis} (have: {', '.join(labels)})")


def seed_axis(study: Study, named: str | None) -> str | None:
    """The axis of repetitions: the one that is named, else `seed` where the study has one."""
    if named is not None:
        return named
    return _SEEDS if _SEEDS in study.axes else None
