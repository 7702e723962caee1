"""Validation curves of finished or running runs: their best values, and where two of them cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from megatron_dlm.scaling.crossings import Curve, compare


@dataclass(frozen=True)
class CurvePoint:
    """One validation of a run."""

    step: int
    epoch: float
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class Crossing:
    """Where the second curve passes below the first for good, between two validations."""

    epoch: float
    nats_per_token: float


def read_validation_curve(path: Path) -> list[CurvePoint]:
    """The validations in a metrics.jsonl, in order; the metric is `nelbo` (the NLL for AR).

    Validations without a finite value are left out, and so is a line that is still being written.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the metrics.jsonl of a run")
    lines = path.read_bytes().split(b"\n")[:-1]
    entries = [entry for line in lines if (entry := orjson.loads(line))["split"] == "valid"]
    curve = [
        CurvePoint(entry["step"], entry["epoch"], entry["tokens"], entry["nelbo"])
        for entry in entries
        if entry["nelbo"] is not None and math.isfinite(entry["nelbo"])
    ]
    if not curve:
        raise ValueError(f"{path} holds no validation; set data.valid in the run's configuration")
    return curve


def best_point(curve: Sequence[CurvePoint]) -> CurvePoint:
    """The first validation with the lowest value."""
    return min(curve, key=lambda point: point.nats_per_token)


def find_crossing(first: Sequence[CurvePoint], second: Sequence[CurvePoint]) -> Crossing | None:
    """Where `second`, above `first` before, passes below it and stays there; None if it does not.

    Both curves are joined by straight lines in the epoch, over the epochs that both cover.
    """
    if max(first[0].epoch, second[0].epoch) >= min(first[-1].epoch, second[-1].epoch):
        return None
    above = _as_curve(second)
    epoch = compare([_as_curve(first)], [above], count=1).crossing.value
    if math.isinf(epoch):
        return None
    return Crossing(epoch, float(np.interp(epoch, above.x, above.y)))


def _as_curve(points: Sequence[CurvePoint]) -> Curve:
    """Of an epoch that was validated twice, the later value."""
    values = {point.epoch: point.nats_per_token for point in points}
    epochs = sorted(values)
    return Curve(np.array(epochs), np.array([values[epoch] for epoch in epochs]))
