"""Kind `curves`: the numbers drawn, smoothing, broken runs, and pictures that show every line."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import colors_in, curve, labels, made_study

from megatron_dlm.scaling.figures.curves import CurvesSpec, draw
from megatron_dlm.scaling.figures.style import COLORS
from megatron_dlm.scaling.results import Results

AXES = {
    "unique": labels("u8k", "u32k"),
    "objective": labels("ar", "masked"),
    "seed": labels("s1", "s2"),
}
SHIFT = {"s1": -0.1, "s2": 0.1}


def u_shaped(place: Any) -> list[dict[str, Any]]:
    """AR is lowest at step 400 with 3.5, masked falls to 3.2 at the end; seeds lie 0.1 around."""
    shift = SHIFT[place["seed"]]
    if place["objective"] == "ar":
        return curve(lambda s: 3.5 + np.log(s / 400) ** 2 + shift)
    return curve(lambda s: 3.2 + np.log(1600 / s) + shift)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


def test_numbers_and_table_are_means_over_seeds(tmp_path: Path) -> None:
    study, results = made_study(AXES, u_shaped)
    drawn = draw(
        CurvesSpec(lines="objective", panels="unique", x="step"), results, study, tmp_path / "f"
    )
    assert [path.name for path in drawn.files] == ["f.png", "f.svg", "f.csv"]
    rows = [dict(zip(drawn.header, row, strict=True)) for row in drawn.rows]
    assert [(row["panel"], row["line"]) for row in rows] == [
        *(("u8k", "ar"), ("u8k", "masked"), ("u32k", "ar"), ("u32k", "masked"))
    ]
    assert (rows[0]["lowest"], rows[0]["at"]) == ("3.500 [3.400, 3.600]", "400")
    assert (rows[1]["last"], rows[1]["at the end"]) == ("3.200 [3.100, 3.300]", "1,600")
    numbers = table(tmp_path / "f.csv")
    assert len(numbers) == 4 * 40
    for row in numbers:
        step, value = float(row["step"]), float(row["nelbo"])
        ar, masked = 3.5 + math.log(step / 400) ** 2, 3.2 + math.log(1600 / step)
        assert value == pytest.approx(ar if row["line"] == "ar" else masked)
        assert float(row["nelbo_low"]) == pytest.approx(value - 0.1)
        assert float(row["nelbo_high"]) == pytest.approx(value + 0.1)
    assert any("range" in note for note in drawn.notes)
    assert any("not smoothed" in note for note in drawn.notes)


def test_the_picture_shows_every_line(tmp_path: Path) -> None:
    study, results = made_study(AXES, u_shaped)
    draw(CurvesSpec(lines="objective", panels="unique"), results, study, tmp_path / "a.b")
    assert set(COLORS[:2]) <= colors_in(tmp_path / "a.b.png")
    assert COLORS[2] not in colors_in(tmp_path / "a.b.png")
    assert (tmp_path / "a.b.svg").read_text().count(COLORS[1].lower()) >= 4


@pytest.mark.parametrize("keys", [{"x_scale": "log"}, {"y_scale": "log"}, {"x": "epoch"}])
def test_scales_draw(tmp_path: Path, keys: dict[str, Any]) -> None:
    study, results = made_study(AXES, u_shaped)
    spec = CurvesSpec(lines="objective", panels="unique", **keys)
    assert len(draw(spec, results, study, tmp_path / "f").rows) == 4


def test_smoothing_takes_noise_and_is_stated(tmp_path: Path) -> None:
    def rough(place: Any) -> list[dict[str, Any]]:
        return curve(lambda s: 3.0 + 0.3 * (-1.0) ** np.arange(len(s)))

    study, results = made_study({"seed": labels("s1")}, rough)
    drawn = draw(CurvesSpec(smoothing=0.1), results, study, tmp_path / "f")
    late = [float(row["nelbo"]) for row in table(tmp_path / "f.csv")][20:]
    assert late == pytest.approx([3.0] * len(late), abs=0.06)
    assert any("smoothed over a factor of 1.11 in x" in note for note in drawn.notes)


def test_a_start_at_zero_is_no_place_in_logarithms(tmp_path: Path) -> None:
    def from_zero(place: Any) -> list[dict[str, Any]]:
        return [{"step": 0, "tokens": 0, "nelbo": 9.0}, *curve(lambda s: 3.0 + 1 / s)]

    study, results = made_study({"seed": labels("s1")}, from_zero)
    draw(CurvesSpec(x="step", x_scale="log", smoothing=0.1), results, study, tmp_path / "f")
    assert float(table(tmp_path / "f.csv")[0]["step"]) == 40
    draw(CurvesSpec(x="step", smoothing=0.1), results, study, tmp_path / "f")
    assert float(table(tmp_path / "f.csv")[0]["nelbo"]) == 9


def test_broken_and_short_runs_are_left_out_and_named(tmp_path: Path) -> None:
    """One run diverged, one has a single report, one stops early: the mean ends where it does."""

    def broken(place: Any) -> list[dict[str, Any]]:
        rows = u_shaped(place)
        if (place["unique"], place["objective"]) == ("u8k", "ar"):
            return (
                rows[:1] if place["seed"] == "s1" else [dict(row, nelbo=math.nan) for row in rows]
            )
        if (place["unique"], place["seed"]) == ("u32k", "s2"):
            return [dict(row, nelbo=None) if row["step"] == 200 else row for row in rows[:20]]
        return rows

    study, results = made_study(AXES, broken)
    drawn = draw(
        CurvesSpec(lines="objective", panels="unique", x="step"), results, study, tmp_path / "f"
    )
    [note] = [note for note in drawn.notes if "Left out" in note]
    assert note.endswith("u8k_ar_s1, u8k_ar_s2.")
    rows = {(row[0], row[1]): row for row in drawn.rows}
    assert ("u8k", "ar") not in rows
    assert rows["u32k", "masked"][-1] == "800"
    assert rows["u8k", "masked"][-1] == "1,600"


def test_the_lowest_is_that_of_the_mean_up_to_where_all_seeds_have_been(tmp_path: Path) -> None:
    """Seeds are lowest at 400 and at 800 with 3.5: their mean is lowest in between, and higher."""

    def seeds(place: Any) -> list[dict[str, Any]]:
        best, steps = (400, 1600) if place["seed"] == "s1" else (800, 1200)
        return curve(lambda s: 3.5 + (s - best) ** 2 / 1e6, num_steps=steps)

    study, results = made_study({"seed": labels("s1", "s2")}, seeds)
    drawn = draw(CurvesSpec(x="step"), results, study, tmp_path / "f")
    assert drawn.rows[0][3:5] == ("3.540", "600")
    assert drawn.notes[-1] == (
        "s2 ends at 1,200, others go on to 1,600; their mean ends with the first."
    )


def test_a_seed_that_has_just_begun_does_not_make_a_lowest_of_the_others(tmp_path: Path) -> None:
    def begun(place: Any) -> list[dict[str, Any]]:
        steps = 1600 if place["seed"] == "s1" else 120
        return curve(lambda s: 5 - s / 1000, num_steps=steps)

    study, results = made_study({"seed": labels("s1", "s2")}, begun)
    drawn = draw(CurvesSpec(x="step"), results, study, tmp_path / "f")
    assert drawn.rows[0][3:] == ("4.880", "120", "4.880", "120")


def test_seeds_without_common_x_are_left_out_and_named(tmp_path: Path) -> None:
    def apart(place: Any) -> list[dict[str, Any]]:
        rows = u_shaped(place)
        if (place["unique"], place["objective"]) != ("u8k", "ar"):
            return rows
        return rows[:10] if place["seed"] == "s1" else rows[20:]

    study, results = made_study(AXES, apart)
    spec = CurvesSpec(lines="objective", panels="unique", x="step")
    drawn = draw(spec, results, study, tmp_path / "f")
    said = "Left out: u8k_ar_s1 ends at 400 and u8k_ar_s2 begins at 840: no x in common."
    assert [row[:2] for row in drawn.rows] == [
        *(("u8k", "masked"), ("u32k", "ar"), ("u32k", "masked"))
    ]
    assert drawn.notes[-1] == said
    only = {"unique": ("u8k",), "objective": ("ar",)}
    with pytest.raises(ValueError, match=rf"run the study further\. {said}"):
        draw(CurvesSpec(x="step", only=only), results, study, tmp_path / "g")


def test_the_best_accuracy_is_the_highest(tmp_path: Path) -> None:
    study, results = made_study(
        {"seed": labels("s1")}, lambda place: curve(lambda s: 0.5 - ((s - 800) / 2000) ** 2)
    )
    drawn = draw(CurvesSpec(x="step", higher_is_better=True), results, study, tmp_path / "f")
    row = dict(zip(drawn.header, drawn.rows[0], strict=True))
    assert (row["highest"], row["at"]) == ("0.500", "800")
    assert "Curves are not smoothed; rings mark the highest mean." in drawn.notes


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    study, results = made_study(AXES, lambda place: u_shaped(place)[:1])
    with pytest.raises(ValueError, match=r"results\.csv: no run has two validations with tokens"):
        draw(CurvesSpec(lines="objective", panels="unique"), results, study, tmp_path / "f")
    with pytest.raises(ValueError, match=r"no row has a value of nll; have: study, run"):
        draw(CurvesSpec(metric="nll"), results, study, tmp_path / "f")
    training = Results(tuple({**row, "split": "train"} for row in results.rows), "train.csv")
    with pytest.raises(ValueError, match=r"train\.csv: no run has validated"):
        draw(CurvesSpec(), training, study, tmp_path / "f")
    with pytest.raises(ValueError, match="smoothing is -1"):
        CurvesSpec(smoothing=-1)
    assert not list(tmp_path.iterdir())


def test_many_lines_all_look_different(tmp_path: Path) -> None:
    names = [f"l{number}" for number in range(12)]
    study, results = made_study(
        {"dropout": labels(*names)},
        lambda place: curve(lambda s: 3.0 + int(place["dropout"][1:]) + 10 / s),
    )
    drawn = draw(CurvesSpec(lines="dropout"), results, study, tmp_path / "f")
    assert [row[1] for row in drawn.rows] == names
    assert set(COLORS) <= colors_in(tmp_path / "f.png")
