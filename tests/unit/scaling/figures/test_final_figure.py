"""Kind `final`: known optima, shifts, references, labels, data potential, and what is missing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import colors_in, curve, labels, made_study

from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.figures.final import FinalSpec, draw
from megatron_dlm.scaling.figures.potential import potential_at
from megatron_dlm.scaling.figures.style import COLORS, axis_name
from megatron_dlm.scaling.results import Results

RATES = {f"x{2**k}": {"optimizer.lr": 1e-3 * 2.0**k} for k in range(7)}
BUDGETS = {f"u{k}": {"data.unique_tokens": 1000 * k} for k in (1, 2, 4, 8, 16)}
SEEDS = labels("s1", "s2", "s3")
SHIFT = {"s1": -0.01, "s2": 0.0, "s3": 0.01}


def ending_at(score: Callable[[Any], float]) -> Callable[[Any], list[dict[str, Any]]]:
    """Runs whose lowest validation is the score, at step 800, and whose last is 1 above."""
    return lambda place: curve(lambda s: score(place) + np.log2(s / 800) ** 2)


def table(drawn: Drawn) -> list[dict[str, str]]:
    return [dict(zip(drawn.header, row, strict=True)) for row in drawn.rows]


def note_with(drawn: Drawn, text: str) -> str:
    [note] = [note for note in drawn.notes if text in note]
    return note


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


def test_learning_rate_basins_and_their_shift(tmp_path: Path) -> None:
    """The standard parametrization halves its best rate as the width doubles, CompleteP not."""
    best = {("standard", "d32"): 8e-3, ("standard", "d64"): 4e-3, ("standard", "d128"): 2e-3}

    def score(place: Any) -> float:
        at = best.get((place["parametrization"], place["width"]), 6e-3)
        return 3 + 0.1 * math.log2(place["optimizer.lr"] / at) ** 2 + SHIFT[place["seed"]]

    axes = {
        "parametrization": labels("standard", "completep"),
        "width": labels("d32", "d64", "d128"),
        "rate": RATES,
        "seed": SEEDS,
    }
    study, results = made_study(axes, ending_at(score))
    spec = FinalSpec(x="optimizer.lr", lines="width", panels="parametrization")
    drawn = draw(spec, results, study, tmp_path / "lr")
    rows = {(row["panel"], row["line"]): row for row in table(drawn)}
    assert [rows["standard", f"d{d}"]["lowest at"] for d in (32, 64, 128)] == [
        "8e-3",
        "4e-3",
        "2e-3",
    ]
    middle = rows["standard", "d64"]
    assert (middle["next below"], middle["next above"]) == ("+0.100", "+0.100")
    assert middle["score"] == "3.000 [2.990, 3.010]"
    assert middle["bottom"].startswith("4e-3 [")
    assert "a factor of 4 between" in note_with(drawn, "standard: best learning rate")
    assert "a factor of 1 between" in note_with(drawn, "completep: best learning rate")
    assert rows["completep", "d32"]["bottom"].startswith("6e-3")
    marked = [row for row in numbers(tmp_path / "lr.csv") if row["is_best"] == "1"]
    assert len(marked) == 6
    assert set(COLORS[:3]) <= colors_in(tmp_path / "lr.png")


def test_ratios_of_pairs(tmp_path: Path) -> None:
    """Constant over cooldown is 1.02 at the small rate and 1.03 at the large one, by seed 0.01."""
    gain = {"x1": 1.02, "x4": 1.03}

    def score(place: Any) -> float:
        cooled = 3 + 0.1 * math.log2(place["optimizer.lr"] / 1e-3)
        factor = gain[place["rate"]] * (1 + SHIFT[place["seed"]])
        return cooled * (factor if place["schedule"] == "constant" else 1)

    rates = {name: RATES[name] for name in gain}
    axes = {"schedule": labels("constant", "cooldown"), "rate": rates, "seed": SEEDS}
    study, results = made_study(axes, ending_at(score))
    spec = FinalSpec(x="optimizer.lr", over={"schedule": "cooldown"})
    spec.check(study)
    drawn = draw(spec, results, study, tmp_path / "f")
    rows = [row for row in table(drawn) if row["learning rate"] != "all"]
    assert [row["learning rate"] for row in rows] == ["1e-3", "4e-3"]
    for row, value in zip(rows, gain.values(), strict=True):
        assert (row["pairs"], row["ratio"].split()[0]) == ("3", f"{value:.4f}")
    [every] = [row for row in table(drawn) if row["learning rate"] == "all"]
    assert (every["pairs"], every["ratio"].split()[0]) == ("6", "1.0250")
    assert drawn.title.endswith(
        "lowest validation loss over that of cooldown against learning rate"
    )
    values = [float(row["nelbo"]) for row in numbers(tmp_path / "f.csv")]
    assert values == pytest.approx(list(gain.values()), rel=1e-9)
    assert COLORS[0] in colors_in(tmp_path / "f.png")


def test_runs_without_a_twin_are_left_out_and_named(tmp_path: Path) -> None:
    axes = {"noise": labels("masked", "uniform"), "rate": {n: RATES[n] for n in ("x1", "x4")}}

    def score(place: Any) -> list[dict[str, Any]]:
        is_missing = (place["noise"], place["rate"]) == ("masked", "x4")
        return [] if is_missing else ending_at(lambda _: 3.0)(place)

    study, results = made_study(axes, score)
    spec = FinalSpec(x="rate", over={"noise": "masked"})
    drawn = draw(spec, results, study, tmp_path / "f")
    assert [row["ratio"] for row in table(drawn)] == ["1.0000"]
    assert note_with(drawn, "without a twin") == "Left out, without a twin masked: uniform_x4."
    alone = FinalSpec(x="rate", over={"noise": "masked"}, only={"rate": ("x4",)})
    with pytest.raises(ValueError, match="no run has a finished twin with masked"):
        draw(alone, results, study, tmp_path / "g")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"x": "rate", "over": {"rate": "x1"}}, "x is rate, which over holds fixed"),
        (
            {"x": "rate", "over": {"noise": "a"}, "reference": {"noise": "b"}},
            "over and reference exclude each other",
        ),
    ],
)
def test_ratios_that_mean_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinalSpec(**keys)


def test_an_optimum_at_the_edge_is_told(tmp_path: Path) -> None:
    axes = {"width": labels("d32", "d64"), "rate": RATES}
    at = {"d32": 8e-3, "d64": 1.0}
    study, results = made_study(
        axes, ending_at(lambda p: 3 + 0.1 * math.log2(p["optimizer.lr"] / at[p["width"]]) ** 2)
    )
    drawn = draw(FinalSpec(x="optimizer.lr", lines="width"), results, study, tmp_path / "f")
    assert "lowest point of d64 is at the edge" in note_with(drawn, "at the edge")
    assert table(drawn)[1]["next above"] == "not trained"
    assert not any("between the smallest" in note for note in drawn.notes)
    assert "One seed each: there is no interval." in drawn.notes


def test_last_scores_are_not_best_ones(tmp_path: Path) -> None:
    study, results = made_study({"rate": RATES}, ending_at(lambda place: 3.0))
    best = draw(FinalSpec(x="optimizer.lr"), results, study, tmp_path / "f")
    assert table(best)[0]["score"] == "3.000"
    assert "lowest validation of each run; all runs end at step 1,600" in note_with(best, "Scores")
    last = draw(FinalSpec(x="optimizer.lr", score="last"), results, study, tmp_path / "f")
    assert table(last)[0]["score"] == "4.000"


def with_reference() -> tuple[Any, Any]:
    models: dict[str, dict[str, Any]] = {"masked": {"objective.kind": "masked"}}
    for dropout in (0.0, 0.1, 0.2, 0.4, 0.8):
        ar = {"objective.kind": "autoregressive", "model.hidden_dropout": dropout}
        models[f"ar-{dropout}"] = ar

    def score(place: Any) -> float:
        shift = 0.1 * SHIFT[place["seed"]]
        if place["model"] == "masked":
            return 3.5 + shift
        return 3.6 + (place["model.hidden_dropout"] - 0.15) ** 2 + shift

    return made_study({"seed": SEEDS, "model": models}, ending_at(score))


def test_a_model_without_an_x_is_a_band(tmp_path: Path) -> None:
    study, results = with_reference()
    spec = FinalSpec(
        x="model.hidden_dropout", lines="objective.kind", reference={"model": "masked"}
    )
    spec.check(study)
    drawn = draw(spec, results, study, tmp_path / "f")
    line, band = table(drawn)
    assert (line["line"], line["lowest at"], line["as good"]) == ("autoregressive", "0.1", "0.2")
    assert line["bottom"].startswith("0.15 [")
    assert (band["line"], band["lowest at"], band["score"]) == (
        "masked",
        "",
        "3.500 [3.499, 3.501]",
    )
    assert note_with(drawn, "lowest score of the others").endswith("0.103 above that of masked.")
    assert "exact NLL, that of diffusion an upper bound" in drawn.notes[0]
    by_line = {row["line"]: row for row in numbers(tmp_path / "f.csv")}
    assert by_line["masked"]["model.hidden_dropout"] == ""
    assert "#404040" in colors_in(tmp_path / "f.png")


def test_a_reference_that_the_study_lacks_is_refused() -> None:
    study, _ = with_reference()
    with pytest.raises(ValueError, match="reference block is no label of model"):
        FinalSpec(x="model.hidden_dropout", reference={"model": "block"}).check(study)


def test_labels_stand_side_by_side_in_the_order_of_the_study(tmp_path: Path) -> None:
    scores = {"uniform": 3.4, "masked": 3.1, "balanced": 3.2}
    axes = {"seed": SEEDS, "noise": labels(*scores)}
    study, results = made_study(axes, ending_at(lambda p: scores[p["noise"]] + SHIFT[p["seed"]]))
    drawn = draw(FinalSpec(x="noise"), results, study, tmp_path / "f")
    rows = table(drawn)
    assert [row["noise"] for row in rows] == list(scores)
    assert [row["from the lowest"] for row in rows] == ["+0.300", "lowest", "+0.100"]
    assert [row["seeds"] for row in rows] == ["3", "3", "3"]
    assert COLORS[0] in colors_in(tmp_path / "f.png")


def test_data_potential_of_two_lines(tmp_path: Path) -> None:
    """masked with U tokens is as good as AR with 4 U: 4 where that was trained, else more than."""

    def score(place: Any) -> float:
        factor = 4 if place["objective"] == "masked" else 1
        return (
            2 + (place["data.unique_tokens"] * factor / 1000) ** -0.5 + SHIFT[place["seed"]] / 100
        )

    axes = {"objective": labels("ar", "masked"), "unique": BUDGETS, "seed": SEEDS}
    study, results = made_study(axes, ending_at(score))
    drawn = draw(
        FinalSpec(x="data.unique_tokens", lines="objective"), results, study, tmp_path / "f"
    )
    found = [row["data potential"] for row in table(drawn)]
    assert [row["unique tokens"] for row in table(drawn)] == ["1k", "2k", "4k", "8k", "16k"]
    assert found == ["4", "4", "4 [4, > 4]", "> 2", "> 1"], "the seeds differ in the fifth digit"
    assert "only this bound is known" in note_with(drawn, "Data potential")
    assert not any("bottom" in name for name in drawn.header)


def test_data_potential_by_hand() -> None:
    first = {1e3: [4.0], 4e3: [3.0], 16e3: [2.0]}
    assert potential_at(first, {1e3: [3.0]}, 1e3).ratio.value == pytest.approx(4)
    assert potential_at(first, first, 4e3).ratio.value == pytest.approx(1)
    assert potential_at(first, first, 1e3).ratio.value == pytest.approx(1)
    half = potential_at(first, {1e3: [math.sqrt(12)]}, 1e3).ratio.value
    assert half == pytest.approx(2), "half way in both logarithms"
    better = potential_at(first, {1e3: [1.9]}, 1e3)
    assert (better.ratio.value, str(better)) == (math.inf, "> 16")
    worse = potential_at(first, {4e3: [4.5]}, 4e3)
    assert (worse.ratio.value, str(worse)) == (0, "< 0.25")
    law = {float(budget): [20 * budget**-0.1] for budget in np.geomspace(1e8, 1e10, 5)}
    shifted = {1e9: [20 * 3e9**-0.1]}
    assert potential_at(law, shifted, 1e9).ratio.value == pytest.approx(3, rel=1e-9)
    bumpy = {1e3: [4.0], 2e3: [3.0], 4e3: [3.5], 8e3: [2.0]}
    assert potential_at(bumpy, {1e3: [3.0]}, 1e3).ratio.value == pytest.approx(2)


def test_data_potential_of_accuracies() -> None:
    """By straight lines of the accuracy itself, which may be 0, or negative as of delta NLL."""
    first = {1e3: [-0.1], 4e3: [0.3], 16e3: [0.5]}
    half = potential_at(first, {1e3: [0.4]}, 1e3, higher_is_better=True)
    assert half.ratio.value == pytest.approx(8), "half way from 4k to 16k"
    assert str(potential_at(first, {1e3: [0.6]}, 1e3, higher_is_better=True)) == "> 16"
    assert str(potential_at(first, {1e3: [-0.2]}, 1e3, higher_is_better=True)) == "< 1"


@pytest.mark.parametrize("x", ["noise", "train.steps"])
def test_higher_may_be_better(tmp_path: Path, x: str) -> None:
    """The same numbers with their sign changed: the same places, lowest becomes highest."""
    scores = {"uniform": 3.4, "masked": 3.1, "balanced": 3.2}
    axes = {"seed": SEEDS, "noise": labels(*scores)}
    if x == "train.steps":
        axes["noise"] = {
            name: {x: 10 * place} for place, name in enumerate(("uniform", "masked", "balanced"), 1)
        }
    study, results = made_study(axes, ending_at(lambda p: scores[p["noise"]] + SHIFT[p["seed"]]))
    turned = Results(
        tuple({**row, "quiz/acc": -row["nelbo"]} for row in results.rows), results.source
    )
    losses = draw(FinalSpec(x=x), results, study, tmp_path / "losses")
    spec = FinalSpec(x=x, metric="quiz/acc", higher_is_better=True)
    found = draw(spec, turned, study, tmp_path / "f")
    assert [row["is_best"] for row in numbers(tmp_path / "f.csv")] == [
        row["is_best"] for row in numbers(tmp_path / "losses.csv")
    ]
    assert [float(row["quiz/acc"]) for row in numbers(tmp_path / "f.csv")] == [
        -float(row["nelbo"]) for row in numbers(tmp_path / "losses.csv")
    ]
    assert found.title == f"{study.name}: highest accuracy on quiz against {x}"
    assert not any("lowest" in text for text in (*found.header, *found.notes))
    assert "highest validation" in note_with(found, "Scores are")
    if x == "noise":
        assert [row["from the highest"] for row in table(found)] == ["-0.300", "highest", "-0.100"]
    else:
        (row,), (loss,) = table(found), table(losses)
        assert (row["highest at"], row["top"]) == (loss["lowest at"], loss["bottom"])
        assert (row["next below"], row["next above"]) == ("-0.300", "-0.100")


def test_scores_of_tasks_have_names_too() -> None:
    assert axis_name("quiz/acc") == "accuracy on quiz"
    assert axis_name("5_shot/quiz/delta_nll") == "delta NLL on 5_shot/quiz [nats]"
    assert axis_name("c4/nelbo") == "validation loss on c4 [nats per token]"
    assert axis_name("quiz/f1") == "quiz/f1"


def test_the_last_score_is_the_last_that_was_reported(tmp_path: Path) -> None:
    """`evaluate` sees checkpoints only; a loss that is not finite at the end is no score."""
    study, results = made_study({"noise": labels("masked", "uniform")}, ending_at(lambda _: 3.0))
    rows = [dict(row) for row in results.rows]
    last = max(row["step"] for row in rows)
    for row in rows:
        early = 0.25 if row["noise"] == "masked" else 0.5
        at_end = None if row["noise"] == "masked" else math.nan
        row["quiz/acc"] = at_end if row["step"] == last else early
    spec = FinalSpec(x="noise", metric="quiz/acc", higher_is_better=True, score="last")
    drawn = draw(spec, Results(tuple(rows), results.source), study, tmp_path / "f")
    assert [row["score"] for row in table(drawn)] == ["0.250"]
    assert "without a finite last quiz/acc: uniform" in note_with(drawn, "Left out")


def test_data_potential_interval_reaches_beyond_what_was_trained() -> None:
    first = {1e3: [4.0, 4.1, 3.9], 4e3: [3.0, 3.1, 2.9]}
    unsure = potential_at(first, {1e3: [2.9, 3.0, 3.2]}, 1e3)
    assert 3.5 < unsure.ratio.value < 4
    assert unsure.ratio.high == math.inf
    assert str(unsure).endswith(", > 4]")


def test_diverged_and_placeless_runs_are_left_out_and_named(tmp_path: Path) -> None:
    def reports(place: Any) -> list[dict[str, Any]]:
        rows = ending_at(lambda _: 3.0 + place["optimizer.lr"])(place)
        if place["rate"] == "x64":
            return [dict(row, nelbo=math.nan) for row in rows]
        if place["rate"] == "x32":
            return [*rows[:-1], dict(rows[-1], nelbo=math.inf)]
        return (
            rows
            if place["rate"] != "x16"
            else [dict(row, **{"optimizer.lr": None}) for row in rows]
        )

    study, results = made_study({"rate": RATES}, reports)
    best = draw(FinalSpec(x="optimizer.lr"), results, study, tmp_path / "f")
    assert note_with(best, "finite").endswith("best nelbo: x64.")
    assert note_with(best, "without a number").endswith("optimizer.lr: x16.")
    last = draw(FinalSpec(x="optimizer.lr", score="last"), results, study, tmp_path / "f")
    assert note_with(last, "finite").endswith("last nelbo: x32, x64.")
    hidden = draw(FinalSpec(x="optimizer.lr", highest=3.005), results, study, tmp_path / "f")
    assert "2 points above 3.005 are not in the picture." in hidden.notes


def test_an_x_without_numbers_lists_those_that_have_some(tmp_path: Path) -> None:
    study, results = made_study({"rate": RATES}, ending_at(lambda _: 3.0), num_parameters=10)
    with pytest.raises(ValueError, match=r"x is learning_rate, .* results\.csv .*num_parameters"):
        draw(FinalSpec(x="learning_rate"), results, study, tmp_path / "f")
    with pytest.raises(ValueError, match="x is missing"):
        FinalSpec()
    with pytest.raises(ValueError, match=r"x1 and x2 have one place .* differ in rate"):
        draw(FinalSpec(x="num_parameters"), results, study, tmp_path / "f")
    with pytest.raises(ValueError, match="no row has a value of nll"):
        draw(FinalSpec(x="optimizer.lr", metric="nll"), results, study, tmp_path / "f")


def test_one_point_is_drawn_without_a_basin(tmp_path: Path) -> None:
    study, results = made_study({"rate": {"x1": RATES["x1"]}}, ending_at(lambda _: 3.0))
    assert draw(FinalSpec(x="optimizer.lr"), results, study, tmp_path / "f").rows == ()
    assert COLORS[0] in colors_in(tmp_path / "f.png")
