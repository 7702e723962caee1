"""Kind `crossover`: known crossings, bounds, curves that cross twice or turn up, and the words."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_results import colors_in, curve, labels, made_study

from megatron_dlm.scaling.figures.crossover import CrossoverSpec, draw
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
    assert "made: masked is lower from the first validation, at 40." in figure.notes


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
    assert any("averaged over about 10% of x" in note for note in figure.notes)


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


def test_equal_results_make_equal_files(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figure, _ = drawn(tmp_path / name, lambda s: 2 + s / 1000, lambda s: 4 - s / 1000)
        found.append([path.read_bytes() for path in figure.files])
    assert found[0] == found[1]
