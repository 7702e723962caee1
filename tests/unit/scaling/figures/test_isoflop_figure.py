"""Kind `isoflop`: laws whose truth is known, conventions, budgets, and what is left out."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import colors_in, labels, made_study

from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.figures.isoflop import IsoflopSpec, draw
from megatron_dlm.scaling.figures.style import COLORS

SIZES = {f"n{place}": int(1e6 * 2**place) for place in range(6)}
BUDGETS = tuple(float(budget) for budget in np.geomspace(3e14, 3e15, 4))
EXPONENTS = {"ar": 0.5, "masked": 0.6}


def loss(size: float, compute: float, exponent: float) -> float:
    """Best size: 4e6 at 1e15 FLOPs, rising with the exponent; the loss there 3 (C / 1e15)^-0.05."""
    best = 4e6 * (compute / 1e15) ** exponent
    return 3 * (compute / 1e15) ** -0.05 + 0.08 * math.log(size / best) ** 2


def curves(place: Any, *, noise: float = 0.0) -> list[dict[str, Any]]:
    """Reports at all budgets and between them; 6 N per token, 10 % more in the fine count."""
    size = SIZES[place["size"]]
    random = np.random.default_rng(size + len(place["objective"]))
    common = random.normal(0, noise)
    facts = {
        "num_parameters": size,
        "num_parameters_without_embeddings": size // 2,
        "training_flops_per_token": 6.0 * size,
        "flops_per_token_six_n": 3.0 * size,
        "flops_per_token_six_p_and_attention": 12.0 * size,
    }
    rows = []
    for step, compute in enumerate(np.geomspace(1e14, 1e16, 61)):
        value = loss(size, compute, EXPONENTS[place["objective"]]) + common
        tokens = compute / (6 * size)
        rows.append({**facts, "step": step + 1, "tokens": tokens, "nelbo": value})
    return rows


AXES = {"objective": labels("ar", "masked"), "size": labels(*SIZES)}


def table(drawn: Drawn) -> dict[tuple[str, str], dict[str, str]]:
    rows = [dict(zip(drawn.header, row, strict=True)) for row in drawn.rows]
    return {(row["line"], row["against compute"]): row for row in rows}


def exponent_in(row: dict[str, str]) -> float:
    return float(row["exponent, 95 % interval"].split()[0])


def test_known_laws_come_back(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    spec = IsoflopSpec(lines="objective", budgets=BUDGETS, resamples=200)
    drawn = draw(spec, results, study, tmp_path / "f")
    rows = table(drawn)
    assert len(rows) == 6
    for line, exponent in EXPONENTS.items():
        # Losses between two reports are read off straight lines, which costs a thousandth.
        assert exponent_in(rows[line, "size"]) == pytest.approx(exponent, abs=2e-3)
        assert exponent_in(rows[line, "data"]) == pytest.approx(1 - exponent, abs=2e-3)
        assert exponent_in(rows[line, "loss"]) == pytest.approx(-0.05, abs=2e-3)
        assert rows[line, "size"]["budgets"] == "4"
    with (tmp_path / "f.csv").open() as lines:
        numbers = list(csv.DictReader(lines))
    assert sum(row["kind"] == "model" for row in numbers) == 2 * 4 * 6
    for row in numbers:
        compute = float(row["compute_flops"])
        assert float(row["tokens"]) * float(row["size"]) * 6 == pytest.approx(compute, rel=1e-6)
        if row["kind"] == "optimum":
            best = 4e6 * (compute / 1e15) ** EXPONENTS[row["line"]]
            assert float(row["size"]) == pytest.approx(best, rel=5e-3)
    assert set(COLORS[:2]) <= colors_in(tmp_path / "f.png")
    assert any("every matrix product" in note for note in drawn.notes)
    assert any("not annealed" in note for note in drawn.notes)


def test_intervals_hold_the_truth_under_noise(tmp_path: Path) -> None:
    study, results = made_study(AXES, lambda place: curves(place, noise=0.01))
    spec = IsoflopSpec(lines="objective", budgets=BUDGETS)
    for (line, name), row in table(draw(spec, results, study, tmp_path / "f")).items():
        truth = {"size": EXPONENTS[line], "data": 1 - EXPONENTS[line], "loss": -0.05}[name]
        low, high = row["exponent, 95 % interval"].split("[")[1].rstrip("]").split(", ")
        assert float(low) - 2e-3 <= truth <= float(high) + 2e-3, (line, name)
        assert float(high) > float(low)


@pytest.mark.parametrize(
    ("flops", "factor", "said"),
    [("six_n", 0.5, "6 N per token"), ("six_p_and_attention", 2.0, "6 P \\+ 12 L a S")],
)
def test_compute_follows_the_convention(
    tmp_path: Path, flops: Any, factor: float, said: str
) -> None:
    study, results = made_study(AXES, curves)
    budgets = tuple(factor * budget for budget in BUDGETS)
    spec = IsoflopSpec(lines="objective", flops=flops, budgets=budgets, resamples=50)
    drawn = draw(spec, results, study, tmp_path / "f")
    [note] = [note for note in drawn.notes if note.startswith("Compute counts")]
    assert said.replace("\\", "") in note
    # The same runs at the same places: the exponent is that of the fine count.
    assert exponent_in(table(drawn)["ar", "size"]) == pytest.approx(0.5, abs=2e-3)


def test_sizes_can_be_told_in_flops_per_token(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    spec = IsoflopSpec(lines="objective", size="flops_per_token", budgets=BUDGETS, resamples=50)
    drawn = draw(spec, results, study, tmp_path / "f")
    assert exponent_in(table(drawn)["ar", "size"]) == pytest.approx(0.5, abs=2e-3)
    assert drawn.title.endswith("training FLOPs per token")


def test_a_number_of_budgets_lies_within_what_four_sizes_cover(tmp_path: Path) -> None:
    def short(place: Any) -> list[dict[str, Any]]:
        """Small models stop early, large ones report late, as with equal tokens."""
        return [row for row in curves(place) if 2e7 <= row["tokens"] <= 3e8]

    study, results = made_study(AXES, short)
    drawn = draw(IsoflopSpec(lines="objective", budgets=4), results, study, tmp_path / "f")
    with (tmp_path / "f.csv").open() as lines:
        models = [row for row in csv.DictReader(lines) if row["kind"] == "model"]
    budgets = {row["compute_flops"] for row in models}
    assert len(budgets) == 4
    for line in EXPONENTS:
        for budget in budgets:
            sizes = {
                row["size"]
                for row in models
                if (row["line"], row["compute_flops"]) == (line, budget)
            }
            assert len(sizes) >= 4
    assert exponent_in(table(drawn)["ar", "size"]) == pytest.approx(0.5, abs=0.01)


def test_optima_outside_of_the_sizes_are_left_out_and_told(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    far = (1.2e14, *BUDGETS, 8e15)  # best: 1.4e6 and 11e6 for AR, 1.1e6 and 14e6 for masked
    only = {"size": ("n1", "n2", "n3")}  # 2e6 to 8e6
    seen = IsoflopSpec(lines="objective", budgets=far, only={"size": ("n0", *only["size"], "n4")})
    drawn = draw(seen, results, study, tmp_path / "f")
    assert table(drawn)["ar", "size"]["budgets"] == "6"
    cut = IsoflopSpec(
        lines="objective", budgets=far, only={"size": (*only["size"], "n4"), "objective": ("ar",)}
    )
    drawn = draw(cut, results, study, tmp_path / "f")
    assert table(drawn)["ar", "size"]["budgets"] == "5"
    [note] = [note for note in drawn.notes if "left out of the laws:" in note]
    assert note.startswith(
        "ar: 1.2e+14 FLOPs left out of the laws: the best, 1.39e+06, lies outside"
    )
    assert exponent_in(table(drawn)["ar", "size"]) == pytest.approx(0.5, abs=2e-3)


def test_without_laws_the_points_are_drawn(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    spec = IsoflopSpec(lines="objective", budgets=(1e15,))
    drawn = draw(spec, results, study, tmp_path / "f")
    assert {row[2] for row in drawn.rows} == {"no laws"}
    assert sum("no laws" in note for note in drawn.notes) == 2
    assert COLORS[0] in colors_in(tmp_path / "f.png")


def test_three_sizes_have_parabolas_and_no_laws(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    three: dict[str, Any] = {"lines": "objective", "only": {"size": ("n1", "n2", "n3")}}
    drawn = draw(IsoflopSpec(**three, budgets=3), results, study, tmp_path / "f")
    assert {row[2] for row in drawn.rows} == {"no laws"}
    [note] = [note for note in drawn.notes if note.startswith("ar: ")]
    assert note.startswith("ar: no laws (0 budgets have a best size; laws need two: ")
    assert note.count("3 runs at 3 settings leave nothing to judge the parabola by") == 1
    assert COLORS[0] not in colors_in(tmp_path / "f.png")
    with (tmp_path / "f.csv").open() as lines:
        assert {row["kind"] for row in csv.DictReader(lines)} == {"model"}
    # A second seed judges them.
    axes = {**AXES, "seed": labels("s1", "s2")}

    def seeds(place: Any) -> list[dict[str, Any]]:
        shift = 0.002 * (place["seed"] == "s2")
        return [{**row, "nelbo": row["nelbo"] + shift} for row in curves(place)]

    study, results = made_study(axes, seeds)
    budgets = tuple(float(budget) for budget in np.geomspace(4e14, 2e15, 3))
    drawn = draw(IsoflopSpec(**three, budgets=budgets), results, study, tmp_path / "f")
    assert exponent_in(table(drawn)["ar", "size"]) == pytest.approx(0.5, abs=2e-3)


def test_a_budget_that_a_line_does_not_reach_is_named(tmp_path: Path) -> None:
    def short(place: Any) -> list[dict[str, Any]]:
        """Masked runs stop early, and at the third budget all but three."""
        last = 2e15 if place["size"] in ("n2", "n3", "n4") else 1e15
        rows = curves(place)
        if place["objective"] == "ar":
            return rows
        return [row for row in rows if row["tokens"] * row["training_flops_per_token"] <= last]

    study, results = made_study(AXES, short)
    spec = IsoflopSpec(lines="objective", budgets=BUDGETS, resamples=50, smoothing=0.1)
    drawn = draw(spec, results, study, tmp_path / "f")
    assert table(drawn)["ar", "size"]["budgets"] == "4"
    assert table(drawn)["masked", "size"]["budgets"] == "2"
    few, none = (note for note in drawn.notes if "left out of the laws:" in note)
    assert few.startswith("masked: 1.39e+15 FLOPs left out of the laws: 3 runs at 3 settings")
    assert none == "masked: 3e+15 FLOPs left out of the laws: no run has a loss there."
    # The width is a standard deviation in ln tokens: exp(0.1) = 1.11.
    assert any("smoothed over a factor of 1.11 in tokens" in note for note in drawn.notes)


def test_last_reports_are_grouped_by_their_compute(tmp_path: Path) -> None:
    """A run for every size and budget, each within 1 % of its budget."""
    axes = {"size": labels(*SIZES), "budget": labels("b0", "b1", "b2", "b3")}

    def runs(place: Any) -> list[dict[str, Any]]:
        budget = BUDGETS[int(place["budget"][1])]
        rows = curves({**place, "objective": "ar"})
        rows = [row for row in rows if row["tokens"] * row["training_flops_per_token"] < budget]
        size, off = SIZES[place["size"]], 1.005 if place["size"] in ("n1", "n4") else 0.995
        last = {**rows[-1], "step": 1000, "tokens": off * budget / (6 * size)}
        return [*rows, {**last, "nelbo": loss(size, budget, 0.5)}]

    study, results = made_study(axes, runs)
    drawn = draw(IsoflopSpec(read="last"), results, study, tmp_path / "f")
    assert table(drawn)["", "size"]["budgets"] == "4"
    assert exponent_in(table(drawn)["", "size"]) == pytest.approx(0.5, abs=0.01)
    assert any("at the end of each run" in note for note in drawn.notes)


def test_the_lowest_of_a_grid_stands_for_its_size(tmp_path: Path) -> None:
    """Another rate is the best one at every other size, and which one is not the same by seed."""
    axes = {"seed": labels("s1", "s2"), "size": labels(*SIZES), "rate": labels("r1", "r2", "r3")}
    shift = {"s1": 0.0, "s2": 0.02}

    def grid(place: Any) -> list[dict[str, Any]]:
        rows = curves({**place, "objective": "ar"})
        best = (list(SIZES).index(place["size"]) + int(place["seed"][1])) % 3 + 1
        too_much = shift[place["seed"]] + 0.1 * abs(int(place["rate"][1]) - best)
        return [{**row, "nelbo": row["nelbo"] + too_much} for row in rows]

    study, results = made_study(axes, grid)
    spec = IsoflopSpec(models="best", budgets=BUDGETS, resamples=50)
    drawn = draw(spec, results, study, tmp_path / "f")
    with (tmp_path / "f.csv").open() as lines:
        models = [row for row in csv.DictReader(lines) if row["kind"] == "model"]
    assert len(models) == len(BUDGETS) * len(SIZES) * 2
    for row in models:
        seed = row["run"].split("_")[0]
        truth = loss(float(row["size"]), float(row["compute_flops"]), 0.5) + shift[seed]
        assert float(row["loss_nats"]) == pytest.approx(truth, abs=2e-3)
    assert exponent_in(table(drawn)["", "size"]) == pytest.approx(0.5, abs=2e-3)
    assert any("lowest of many" in note for note in drawn.notes)
    with pytest.raises(ValueError, match=r"have one place in the figure; they differ in rate"):
        draw(IsoflopSpec(budgets=BUDGETS), results, study, tmp_path / "f")


def test_a_run_of_another_budget_is_no_member(tmp_path: Path) -> None:
    study, results = made_study(AXES, curves)
    with pytest.raises(ValueError, match=r"results\.csv: no run reaches one of the budgets"):
        draw(IsoflopSpec(lines="objective", budgets=(1e18,)), results, study, tmp_path / "f")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"panels": "size"}, "isoflop has a panel for every line"),
        ({"budgets": 0}, "budgets is 0"),
        ({"budgets": (1e15, -1.0)}, "budgets must be greater than 0"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
def test_impossible_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IsoflopSpec(**keys)


def test_what_the_table_lacks_is_named(tmp_path: Path) -> None:
    def bare(place: Any) -> list[dict[str, Any]]:
        dropped = ("flops_per_token_six_n",)
        return [{k: v for k, v in row.items() if k not in dropped} for row in curves(place)]

    study, results = made_study(AXES, bare)
    with pytest.raises(ValueError, match="no row has a value of flops_per_token_six_n"):
        draw(IsoflopSpec(lines="objective", flops="six_n"), results, study, tmp_path / "f")
    with pytest.raises(ValueError, match=r"ar_n0 and masked_n0 have one place .* objective"):
        draw(IsoflopSpec(), results, study, tmp_path / "f")
