"""What is drawn of a study that declares no figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.scaling.figures.checks import seed_axis
from megatron_dlm.scaling.figures.curves import CurvesSpec
from megatron_dlm.scaling.figures.kinds import Spec

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study


def default_figures(study: Study) -> dict[str, Spec]:
    """Validation curves: the first axis makes lines, the second panels, `seed` repetitions.

    Nothing for a study of more axes: which of them to look at is its author's to say.
    """
    axes = [axis for axis in study.axes if axis != seed_axis(study, None)]
    if len(axes) > 2:
        return {}
    lines, panels = (*axes, None, None)[:2]
    return {"curves": CurvesSpec(lines=lines, panels=panels)}
