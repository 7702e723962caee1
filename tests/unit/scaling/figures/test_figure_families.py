"""Which runs share a line, what stands in the way, and the scales and legends of figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import curve, labels, made_study

from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.families import (
    Grouping,
    bound_note,
    estimate_of,
    in_words,
    interval_note,
    mean_over_seeds,
    members_of,
    refuse_twins,
    smoothing_words,
)
from megatron_dlm.scaling.figures.scales import is_logarithmic, legend_above, short_tick
from megatron_dlm.scaling.figures.style import look, new_panels, save

AXES = {
    "width": labels("w64", "w128"),
    "objective": {
        "masked": {"objective.kind": "masked"},
        "ar": {"objective.kind": "autoregressive"},
    },
    "seed": labels("s2", "s1"),
}


def flat(_: object) -> list[dict[str, object]]:
    return curve(lambda steps: 3.0 + 0 * steps, num_steps=120)


def test_members_come_in_the_order_of_the_study() -> None:
    study, results = made_study(AXES, flat)
    members = members_of(results, study, Grouping(lines="objective", panels="width"))
    assert [(m.panel, m.line, m.seed) for m in members] == [
        (panel, line, seed)
        for panel in ("w64", "w128")
        for line in ("masked", "ar")
        for seed in ("s2", "s1")
    ]
    assert all(len(member.rows) == 3 for member in members)


def test_a_setting_can_be_a_line_and_labels_can_be_chosen() -> None:
    study, results = made_study(AXES, flat)
    grouping = Grouping(lines="objective.kind", only={"width": ("w128",), "seed": ("s1",)})
    grouping.check(study)
    members = members_of(results, study, grouping)
    assert [(m.run, m.line) for m in members] == [
        ("w128_masked_s1", "masked"),
        ("w128_ar_s1", "autoregressive"),
    ]


def test_numbers_are_labels_too() -> None:
    axes = {"lr": {"a": {"optimizer.lr": 1e-3}, "b": {"optimizer.lr": 2e-3}}}
    study, results = made_study(axes, flat)
    members = members_of(results, study, Grouping(lines="optimizer.lr"))
    assert [member.line for member in members] == ["0.001", "0.002"]


def test_numbers_have_the_digits_that_they_need_to_differ() -> None:
    """With three digits these would be one line each: a mean of runs that are no seeds."""
    sizes = {"a": 12_300_000, "b": 12_340_000, "c": 1024, "d": 999.6}
    study, results = made_study(
        {"size": {name: {"model.size": size} for name, size in sizes.items()}}, flat
    )

    def lines(*chosen: str) -> list[str]:
        grouping = Grouping(lines="model.size", only={"size": chosen})
        return [member.line for member in members_of(results, study, grouping)]

    assert lines("a", "b") == ["12.3M", "12.34M"]
    assert lines("b", "c", "d") == ["12.3M", "1,024", "1,000"]
    assert lines("c", "d") == ["1,024", "1,000"]
    rates = {"a": 0.0012341, "b": 0.0012344}
    study, results = made_study(
        {"rate": {name: {"optimizer.lr": rate} for name, rate in rates.items()}}, flat
    )
    members = members_of(results, study, Grouping(panels="optimizer.lr"))
    assert [member.panel for member in members] == ["0.0012341", "0.0012344"]
    refuse_twins(members, study, lambda member: member.panel)


def test_truth_is_a_label_and_no_number() -> None:
    axes = {"tied": {"yes": {"model.tied": True}, "one": {"model.tied": 1}}}
    study, results = made_study(axes, flat)
    members = members_of(results, study, Grouping(lines="model.tied"))
    assert [member.line for member in members] == ["True", "1"]


def test_runs_that_share_a_place_are_refused_with_the_axis_to_blame() -> None:
    study, results = made_study(AXES, flat)
    members = members_of(results, study, Grouping(lines="objective"))
    with pytest.raises(ValueError, match=r"w64_masked_s2 and w128_masked_s2 .* differ in width:"):
        refuse_twins(members, study, lambda member: (member.line, member.seed))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lines": "widht"}, "lines widht is no axis of made and no setting of one"),
        ({"panels": "model.layers"}, "panels model.layers is no axis"),
        ({"seeds": "sed"}, "seeds sed is no axis of made; did you mean seed"),
        ({"only": {"width": ("w1",)}}, r"only w1 is no label of width \(have: w64, w128\)"),
        ({"only": {"depth": ("w1",)}}, "only depth is no axis"),
    ],
)
def test_what_the_study_lacks_is_named(keys: dict[str, object], message: str) -> None:
    study, _ = made_study(AXES, flat)
    with pytest.raises(ValueError, match=message):
        Grouping(**keys).check(study)  # type: ignore[arg-type]


def test_a_table_without_the_axis_is_refused() -> None:
    study, _ = made_study(AXES, flat)
    _, other = made_study({"seed": labels("s1")}, flat)
    with pytest.raises(ValueError, match=r"results\.csv: no row has a value of width"):
        members_of(other, study, Grouping(panels="width"))


def test_intervals_by_the_number_of_seeds() -> None:
    one, two = estimate_of([3.0]), estimate_of([3.0, 4.0])
    assert (one.value, one.low, one.high) == (3, 3, 3)
    assert (two.value, two.low, two.high) == (3.5, 3, 4)
    random = np.random.default_rng(0)
    many = estimate_of(random.normal(5, 1, 400).tolist())
    assert many.high - many.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert in_words(one) == "3.000"
    same = estimate_of([3.1, 3.1, 3.1])
    assert same.low == same.value == same.high, "rounding is no interval"
    assert in_words(two) == "3.500 [3.000, 4.000]"


def test_curves_have_an_interval_at_every_point() -> None:
    values = np.random.default_rng(1).normal(0, 1, (7, 5)) + np.arange(5)
    mean, low, high = mean_over_seeds(values)
    for place in range(5):
        alone = estimate_of(values[:, place].tolist())
        assert (mean[place], low[place], high[place]) == pytest.approx(
            (alone.value, alone.low, alone.high)
        )


def test_notes_say_what_intervals_are() -> None:
    assert interval_note([1, 1]) == "One seed each: there is no interval."
    note = interval_note([3, 2, 1, 5])
    assert "bootstrap" in note
    assert "3 to 5 seeds" in note
    assert "range where there are two" in note
    assert "none where there is one" in note
    assert "bootstrap" not in interval_note([2, 2])


def test_notes_say_what_is_a_bound() -> None:
    study, results = made_study(AXES, flat)

    def note(metric: str, **only: tuple[str, ...]) -> tuple[str, ...]:
        return bound_note(members_of(results, study, Grouping(only=only)), metric, study)

    assert note("nelbo", objective=("ar",)) == ("All losses are exact.",)
    assert "upper bounds" in note("nelbo", objective=("masked",))[0]
    assert "AR is the exact NLL, that of diffusion an upper bound" in note("nelbo")[0]
    assert note("grad_norm") == ()
    study, results = made_study({"seed": labels("s1")}, flat)
    assert "exact NLL of AR models and an upper bound" in note("nelbo")[0]
    [run] = study.runs
    study = replace(study, runs=(replace(run, settings={"objective.kind": "hybrid"}),))
    assert "All losses are upper bounds" in note("nelbo")[0], "what all runs share is no column"


def test_smoothing_is_a_factor_of_x_and_a_width_of_its_logarithm() -> None:
    words = "a factor of 1.65 in tokens (a Gaussian with a standard deviation of 0.5 in ln tokens)"
    assert smoothing_words(0.5, "tokens") == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((999.4, "999"), (999.6, "1,000"), (1000, "1,000"), (8192, "8,192"), (0.0123, "0.0123")),
        *((26.416, "26.4"), (9_994_999, "9,994,999"), (9_999_999, "10M"), (12_345_678, "12.3M")),
        *((1.2e-5, "1.2e-5"), (6.02e21, "6.02e21"), (0, "0"), (-1600, "-1,600")),
    ],
)
def test_words_are_short(value: float, words: str) -> None:
    assert in_short(value) == words


def test_more_digits_tell_more_numbers_apart() -> None:
    assert (in_short(1234.4), in_short(1234.4, 5), in_short(26.416, 4)) == (
        *("1,234", "1,234.4", "26.42"),
    )
    assert (short_tick(12_345_678, 4), short_tick(3.2124e-4, 4)) == ("12.35M", "3.212e-4")


@pytest.mark.parametrize(
    ("value", "tick"),
    [
        *((8192, "8.19k"), (131072, "131k"), (2e6, "2M"), (1e10, "10G"), (999_999, "1M")),
        *((3e-4, "3e-4"), (0.1, "0.1"), (4e15, "4e15"), (0, "0"), (200, "200"), (-2000, "-2k")),
    ],
)
def test_ticks_are_short(value: float, tick: str) -> None:
    assert short_tick(value) == tick


def test_seven_lines_have_seven_colors_and_markers_and_many_differ_in_both() -> None:
    looks = [look(number) for number in range(42)]
    for key in ("color", "marker", "linestyle"):
        assert len({each[key] for each in looks[:7]}) == 7, key
    assert len({(each["color"], each["marker"]) for each in looks}) == 42


def test_logarithms_where_numbers_span_much() -> None:
    assert is_logarithmic([1e3, 1e5], "auto")
    assert not is_logarithmic([0.1, 0.5], "auto")
    assert not is_logarithmic([0.0, 0.9], "auto")
    assert not is_logarithmic([1e3, 1e5], "linear")
    with pytest.raises(ValueError, match="scale is log, but a value is 0"):
        is_logarithmic([0, 1], "log")


def test_a_long_legend_stays_inside_of_the_figure(tmp_path: Path) -> None:
    figure, [axes] = new_panels(1)
    for number in range(12):
        axes.plot([0, 1], [0, number], label=f"a rather long label {number}")
    legend_above(figure, [axes])
    save(figure, tmp_path / "legend")
    box = figure.legends[0].get_window_extent()
    width, height = figure.get_size_inches() * figure.dpi
    assert box.x0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
