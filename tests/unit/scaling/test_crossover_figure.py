"""Kind `crossover`: known crossings, bounds, curves that cross twice or turn up, and the words."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import colors_in, curve, labels, made_study

from megatron_dlm.scaling.figures.crossover import draw
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.figures.style import COLORS

Shape = Callable[[np.ndarray], np.ndarray]
SHIFTS = {"s1": -0.1, "s2": 0.1, "s3": 0.0}


def drawn(
    tmp_path: Path, ar: Shape, masked: Shape, *, seeds: tuple[str, ...] = ("s1", "s2"), **keys: str
) -> tuple[Drawn, dict[str, str]]:
    """The figure of one setting, and its line of numbers; curves as functions of the step."""
    shapes = {"ar": ar, "masked": masked}
    study, results = made_study(
        {"objective": labels("ar", "masked"), "seed": labels(*seeds)},
        lambda at: curve(lambda step: shapes[at["objective"]](step) + SHIFTS[at["seed"]]),
    )
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", **{"x": "step", **keys})
    spec.check(study)
    figure = draw(spec, results, study, tmp_path / "figure.1")
    with (tmp_path / "figure.1.csv").open(newline="") as file:
        (numbers,) = csv.DictReader(file)
    return figure, numbers


def test_lines_that_cross(tmp_path: Path) -> None:
    """2 + s/1000 and 4 - s/1000 cross at 1000; seeds shift it by at most 100."""
    figure, numbers = drawn(tmp_path, lambda s: 2 + s / 1000, lambda s: 4 - s / 1000)
    assert numbers["outcome"] == "crosses"
    assert float(numbers["crossing"]) == pytest.approx(1000)
    assert float(numbers["crossing_low"]) == pytest.approx(900)
    assert float(numbers["crossing_high"]) == pytest.approx(1100)
    assert numbers["share_of_resamples"] == "1.0"
    assert (numbers["first"], numbers["second"], numbers["x"]) == ("ar", "masked", "step")
    # The best of ar is its first point, that of masked its last.
    assert float(numbers["best_first"]) == pytest.approx(2.04)
    assert float(numbers["best_first_x"]) == 40
    assert float(numbers["best_difference"]) == pytest.approx(2.4 - 2.04)
    assert float(numbers["best_difference_low"]) == pytest.approx(2.4 - 2.04 - 0.2)
    ((place, interval, share, *_),) = figure.rows
    assert (place, interval, share) == ("1,000", "900 to 1,100", "100%")
    assert not any("no crossing" in note for note in figure.notes)
    assert [path.name for path in figure.files] == ["figure.1.png", "figure.1.svg", "figure.1.csv"]
    assert set(COLORS[:2]) <= colors_in(figure.files[0])


def test_no_crossing_is_a_bound(tmp_path: Path) -> None:
    figure, numbers = drawn(tmp_path, lambda s: 2 + 0 * s, lambda s: 4 - s / 1000)
    assert (numbers["outcome"], numbers["crossing"]) == ("not yet", "")
    assert (numbers["end_of_range"], numbers["share_of_resamples"]) == ("1600.0", "0.0")
    assert figure.rows[0][0] == "not before 1,600"
    assert "made: no crossing for good up to 1,600, where the range ends." in figure.notes


def test_lower_from_the_start_is_a_bound_too(tmp_path: Path) -> None:
    figure, numbers = drawn(tmp_path, lambda s: 3 + 0 * s, lambda s: 2 + 0 * s)
    assert (numbers["outcome"], numbers["crossing"]) == ("from the start", "")
    assert figure.rows[0][0] == "before 40"
    assert "made: masked is lower all along, from 40 on." in figure.notes


def test_several_crossings_are_told(tmp_path: Path) -> None:
    """sin is below 0 from pi to 2 pi, and again from 3 pi on: pi is at step 400."""
    figure, numbers = drawn(
        tmp_path, lambda s: 2 + 0 * s, lambda s: 2 + np.sin(np.pi * (s - 1) / 400)
    )
    assert [round(float(x), -1) for x in numbers["passages"].split(";")] == [400, 800, 1200]
    assert float(numbers["crossing"]) == pytest.approx(1201, abs=2)
    assert "made: the means cross at 401, 801, 1,201." in figure.notes


def test_a_crossing_that_does_not_last_is_none(tmp_path: Path) -> None:
    figure, numbers = drawn(
        tmp_path, lambda s: 2 + 0 * s, lambda s: 2.001 + np.cos(np.pi * s / 800)
    )
    assert numbers["outcome"] == "not yet"
    assert figure.rows[0][0] == "not before 1,600"
    assert figure.notes[-1].endswith("where the range ends; the means cross at 400, 1,200.")


def test_a_curve_that_turns_up_is_judged_by_its_best(tmp_path: Path) -> None:
    """AR has its minimum of 2 at step 400 and is overtaken at 1200, by something that is worse."""
    figure, numbers = drawn(
        tmp_path,
        lambda s: 2 + ((s - 400) / 400) ** 2 / 4,
        lambda s: 3.0 + 0 * s,
        seeds=("s3",),
    )
    assert float(numbers["crossing"]) == pytest.approx(1200)
    assert (float(numbers["best_first"]), float(numbers["best_first_x"])) == (2.0, 400)
    assert float(numbers["best_difference"]) == pytest.approx(1.0)
    assert "a crossing alone may only say that the other curve has turned up" in figure.notes[2]
    assert "There is one seed, and no interval." in figure.notes[1]
    # One seed gives no interval, and no share.
    for name in ("crossing_low", "share_of_resamples", "best_difference_low"):
        assert numbers[name] == ""
    assert figure.rows[0][1:3] == ("one seed", "")
    assert figure.rows[0][-1] == "+1.000"


def test_smoothing_is_said(tmp_path: Path) -> None:
    figure, _ = drawn(tmp_path, lambda s: 2 + s / 1000, lambda s: 4 - s / 1000)
    assert "Curves are not smoothed." in figure.notes
    spec = {"smoothing": 0.1}
    figure, _ = drawn(tmp_path, lambda s: 2 + s / 1000, lambda s: 4 - s / 1000, **spec)  # type: ignore[arg-type]
    words = (
        "averaged over a factor of 1.11 in x (a Gaussian with a standard deviation of 0.1 in ln x)"
    )
    assert any(words in note for note in figure.notes)


def test_only_chosen_settings_are_compared(tmp_path: Path) -> None:
    study, results = made_study(
        {"objective": labels("ar", "masked"), "unique": labels("u1", "u2")},
        lambda at: curve(lambda s: 4 - s / 1e3),
    )
    keys = {"axis": "objective", "first": "ar", "second": "masked", "x": "step"}
    spec = CrossoverSpec(**keys, only={"unique": ("u2",)}, highest=3.5)  # type: ignore[arg-type]
    spec.check(study)
    figure = draw(spec, results, study, tmp_path / "figure")
    assert [row[0] for row in figure.rows] == ["u2"]
    assert "Values above 3.5 are not shown in the picture." in figure.notes
    with pytest.raises(ValueError, match="only u3 is no label of unique"):
        CrossoverSpec(**keys, only={"unique": ("u3",)}).check(study)  # type: ignore[arg-type]


def test_settings_without_both_labels_are_left_out(tmp_path: Path) -> None:
    study, results = made_study(
        {"objective": labels("ar", "masked"), "unique": labels("u1", "u2")},
        lambda at: (
            [] if at == {"objective": "ar", "unique": "u2"} else curve(lambda s: 4 - s / 1e3)
        ),
    )
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    assert [row[0] for row in figure.rows] == ["u1"]
    assert figure.notes[-1] == "Left out, without a curve of ar: u2."
    one = made_study(
        {"objective": labels("ar", "masked")},
        lambda at: curve(lambda s: 4 - s / 1e3) if at["objective"] == "ar" else [],
    )
    message = (
        r"^results\.csv: no setting of made has two validations with nelbo of both ar and masked; "
        "run the study further"
    )
    with pytest.raises(ValueError, match=message):
        draw(spec, one[1], one[0], tmp_path / "figure")


def test_a_metric_that_was_not_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.csv: no row has a value of entropy; have: stu"):
        drawn(tmp_path, lambda s: 2 + 0 * s, lambda s: 3 + 0 * s, metric="entropy")


def test_an_interval_tells_what_does_not_cross(tmp_path: Path) -> None:
    """Of three seeds one crosses late: in 7 of 27 resamples it is not before the end."""
    ar = {"s1": 2.0, "s2": 2.0, "s3": 2.0}
    masked = {"s1": 2.3, "s2": 2.3, "s3": 5.2}
    study, results = made_study(
        {"objective": labels("ar", "masked"), "seed": labels("s1", "s2", "s3")},
        lambda at: curve(
            lambda s: (
                ar[at["seed"]] + 0 * s if at["objective"] == "ar" else masked[at["seed"]] - s / 1000
            )
        ),
    )
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    place, interval, share, *_ = figure.rows[0]
    assert (place, interval) == ("1,267", "300 to > 1,600")
    assert share in {"71%", "72%", "73%", "74%", "75%", "76%"}
    with (tmp_path / "figure.csv").open(newline="") as file:
        (numbers,) = csv.DictReader(file)
    assert (numbers["outcome"], numbers["crossing_high"]) == ("crosses", "inf")
    assert any("count as later than the end (>)" in note for note in figure.notes)


def cut(steps: dict[str, int]) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    """AR at 2 and masked falling from 2.5; run -> its last step, 1,600 where it is not named."""

    def reports(at: Mapping[str, Any]) -> list[dict[str, Any]]:
        name = "_".join(str(label) for label in at.values())
        shape = (lambda s: 2 + 0 * s) if at["objective"] == "ar" else (lambda s: 2.5 - s / 1000)
        return curve(shape, num_steps=steps.get(name, 1600))

    return reports


def test_a_seed_that_has_just_begun_is_named(tmp_path: Path) -> None:
    study, results = made_study(
        {"objective": labels("ar", "masked"), "seed": labels("s1", "s2")},
        cut({"masked_s2": 120}),
    )
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    (row,) = figure.rows
    # Bests are those of the first 120 steps, not that of s1 at 1,600 beside that of s2 at 120.
    assert (row[0], *row[-3:]) == ("not before 120", "2.000", "2.380", "+0.380 (+0.380 to +0.380)")
    assert figure.notes[-1] == (
        "made: no crossing for good up to 120, where the range ends; masked_s2 ends at 120, others "
        "go on to 1,600; crossings, rings and bests are of what all have reached."
    )


def test_unequal_ends_of_single_runs_are_told(tmp_path: Path) -> None:
    study, results = made_study({"objective": labels("ar", "masked")}, cut({"masked": 1000}))
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    assert (figure.rows[0][0], figure.rows[0][-1]) == ("500", "-0.500")
    assert figure.notes[-1].startswith("made: masked ends at 1,000, others go on to 1,600;")


def test_a_setting_without_common_x_is_left_out_and_named(tmp_path: Path) -> None:
    def reports(at: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = cut({})(at)
        late = at["objective"] == "masked" and at["unique"] == "u2"
        return rows[30:] if late else rows[:20] if at["unique"] == "u2" else rows

    axes = {"objective": labels("ar", "masked"), "unique": labels("u1", "u2")}
    study, results = made_study(axes, reports)
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    assert [row[:2] for row in figure.rows] == [("u1", "500")]
    said = "ar_u2 ends at 800 and masked_u2 begins at 1,240: no x in common."
    assert figure.notes[-1] == f"u2: left out, {said}"
    spec = CrossoverSpec(
        axis="objective", first="ar", second="masked", x="step", only={"unique": ("u2",)}
    )
    with pytest.raises(ValueError, match=rf"run the study further\. u2: left out, {said}"):
        draw(spec, results, study, tmp_path / "figure")


def test_accuracies_pass_above(tmp_path: Path) -> None:
    """0.3 + s / 16000 and 0.2 + 3 s / 16000 meet at 800."""
    slopes = {"ar": (0.3, 1), "masked": (0.2, 3)}

    def reports(at: Mapping[str, Any]) -> list[dict[str, Any]]:
        start, slope = slopes[at["objective"]]
        rows = curve(lambda s: start + slope * s / 16000)
        return [{**row, "accuracy": row["nelbo"]} for row in rows]

    study, results = made_study({"objective": labels("ar", "masked")}, reports)
    spec = CrossoverSpec(*("objective", "ar", "masked", "step", "accuracy"), higher_is_better=True)
    figure = draw(spec, results, study, tmp_path / "figure")
    assert figure.rows == (("800", "one seed", "", "0.400", "0.500", "+0.100"),)
    assert figure.title == "masked above ar: accuracy"
    text = " ".join(figure.notes)
    assert "passes above that of ar" in text
    assert "A ring is the highest point" in text
    assert "turned down" in text
    assert "low" not in text


def test_runs_with_a_single_report_are_named(tmp_path: Path) -> None:
    study, results = made_study(
        {"objective": labels("ar", "masked"), "seed": labels("s1", "s2")}, cut({"ar_s2": 40})
    )
    spec = CrossoverSpec(axis="objective", first="ar", second="masked", x="step")
    figure = draw(spec, results, study, tmp_path / "figure")
    assert figure.notes[-1] == "Left out, with fewer than two values of nelbo: ar_s2."


def test_equal_results_make_equal_files(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figure, _ = drawn(tmp_path / name, lambda s: 2 + s / 1000, lambda s: 4 - s / 1000)
        found.append([path.read_bytes() for path in figure.files])
    assert found[0] == found[1]
