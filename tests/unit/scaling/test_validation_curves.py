"""Reading validation curves, their crossing, and the figure."""

from __future__ import annotations

import json
import math

import pytest

from megatron_dlm.scaling.crossover import (
    CurvePoint,
    best_point,
    find_crossing,
    read_validation_curve,
)
from megatron_dlm.scaling.plots import plot_validation_curves

UNIQUE_TOKENS = 20_000


def curve(values, epochs=None):
    epochs = epochs or range(1, len(values) + 1)
    return [
        CurvePoint(step=10 * number, epoch=float(epoch), tokens=100 * number, nats_per_token=value)
        for number, (epoch, value) in enumerate(zip(epochs, values, strict=True), start=1)
    ]


def write_run(path, loss, *, unique_tokens=UNIQUE_TOKENS, epochs=range(0, 660, 20)):
    with path.open("w") as file:
        for epoch in epochs:
            entry = {"step": 5 * epoch, "epoch": epoch, "tokens": epoch * unique_tokens}
            file.write(json.dumps({**entry, "split": "train", "nelbo": 0.1, "loss": 0.1}) + "\n")
            file.write(json.dumps({**entry, "split": "valid", "nelbo": loss(epoch)}) + "\n")
    return path


def ar_loss(epoch):
    return 2.4 + 3.2 * math.exp(-epoch / 15) + 2.4 * (1 - math.exp(-max(0, epoch - 60) / 200))


def masked_loss(epoch):
    return 2.4 + 3.2 * math.exp(-epoch / 90)


def test_crossing_is_where_straight_lines_meet():
    crossing = find_crossing(curve([2.0, 2.0, 3.0]), curve([4.0, 3.0, 2.0]))
    assert (crossing.epoch, crossing.nats_per_token) == pytest.approx((2.5, 2.5))


def test_crossing_of_curves_with_other_epochs():
    first = curve([1.0, 3.0], epochs=[0, 4])  # 1 + e / 2
    second = curve([3.0, 2.5, 1.0], epochs=[1, 2, 5])  # 3.5 - e / 2
    crossing = find_crossing(first, second)
    assert (crossing.epoch, crossing.nats_per_token) == pytest.approx((2.5, 2.25))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([2.0, 2.0, 2.0], [4.0, 3.0, 2.5]),  # never reached
        ([2.0, 2.0, 2.0], [4.0, 1.0, 2.5]),  # below for a while only
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),  # below from the start: nothing crosses
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0]),
    ],
)
def test_no_crossing(first, second):
    assert find_crossing(curve(first), curve(second)) is None


def test_the_crossing_for_good_counts():
    crossing = find_crossing(curve([2.0] * 5), curve([3.0, 1.0, 3.0, 1.0, 1.0]))
    assert crossing.epoch == pytest.approx(3.5)


def test_best_point_is_the_first_lowest():
    assert best_point(curve([3.0, 2.0, 2.0, 4.0])).epoch == 2


def test_reading_takes_whole_finite_validations_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    place = {"tokens": 8, "epoch": 0.5}
    entries = [
        {"step": 1, "split": "train", "nelbo": 9.0, **place},
        {"step": 1, "split": "valid", "nelbo": 3.0, **place},
        {"step": 2, "split": "valid", "nelbo": None, **place},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step":3,"spl')
    assert read_validation_curve(path) == [CurvePoint(1, 0.5, 8, 3.0)]


def test_missing_file_and_missing_validation_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        read_validation_curve(tmp_path / "nowhere.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"split":"train","nelbo":1.0}\n')
    with pytest.raises(ValueError, match=r"holds no validation"):
        read_validation_curve(path)


def test_figure_and_summary(tmp_path):
    runs = {
        "autoregressive": write_run(tmp_path / "ar.jsonl", ar_loss),
        "masked diffusion": write_run(tmp_path / "masked.jsonl", masked_loss),
    }
    summary = plot_validation_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.glob("*curves*")) == ["curves.png"]
    assert summary.best["autoregressive"].epoch == 60
    assert summary.last["masked diffusion"].nats_per_token == pytest.approx(masked_loss(640))
    at = summary.crossing.epoch
    assert ar_loss(at) == pytest.approx(masked_loss(at), abs=0.02)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_any_number_of_runs(tmp_path, num_runs):
    runs = {
        f"run {number}": write_run(
            tmp_path / f"{number}.jsonl", masked_loss, unique_tokens=1000 * (number + 1)
        )
        for number in range(num_runs)
    }
    summary = plot_validation_curves(runs, tmp_path / "curves.svg")
    assert summary.crossing is None
    # Tokens get an axis only if all runs mean the same by an epoch.
    assert ("training tokens" in (tmp_path / "curves.svg").read_text()) == (num_runs == 1)


def test_a_single_validation_can_be_drawn(tmp_path):
    run = write_run(tmp_path / "short.jsonl", masked_loss, epochs=[0])
    assert plot_validation_curves({"short": run}, tmp_path / "one.png").crossing is None


def test_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        plot_validation_curves({}, tmp_path / "curves.png")
