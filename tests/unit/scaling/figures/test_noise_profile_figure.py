"""Kind `noise_profile`: ranges in order, both kinds of loss, steps, and runs without a profile."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_results import colors_in, curve, labels, made_study

from megatron_dlm.scaling.figures.noise_profile import NoiseProfileSpec, draw
from megatron_dlm.scaling.figures.style import COLORS

AXES = {"objective": labels("masked", "hybrid", "ar"), "seed": labels("s1", "s2")}
SHIFT = {"s1": -0.1, "s2": 0.1}


def profiled(place: Any) -> list[dict[str, Any]]:
    """Loss 1 + 4 t at noise t, and less by 1 for hybrid; 100 / step more before the end."""
    rows = curve(lambda s: 3.0 + 0 * s, num_steps=200)
    if place["objective"] == "ar":
        return rows
    kind, less = ("nll", 0.0) if place["objective"] == "masked" else ("nelbo", 1.0)
    for row in rows:
        # Two digits sort wrongly as text: 0.05 and 0.1 must not.
        for low, high in ((0.1, 0.5), (0.05, 0.1), (0.5, 1.0), (0.0, 0.05)):
            value = 1 + 2 * (low + high) - less + SHIFT[place["seed"]] + 100 / row["step"]
            row[f"{kind}_at_noise_{low:.4g}-{high:.4g}"] = value
    return rows


def test_profiles_of_the_last_step(tmp_path: Path) -> None:
    study, results = made_study(AXES, profiled)
    drawn = draw(NoiseProfileSpec(lines="objective"), results, study, tmp_path / "f")
    assert drawn.header[3:] == (
        *("noise 0 to 0.05", "noise 0.1 to 0.5", "noise 0.5 to 1", "mean over the noise"),
    )
    # 1.5 more at step 200 is 0.5; the mean of 1 + 4 t over t is 3.
    assert drawn.rows == (
        ("", "masked", "2", "1.600", "2.700", "4.500", "3.500"),
        ("", "hybrid", "2", "0.600", "1.700", "3.500", "2.500"),
    )
    with (tmp_path / "f.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["noise_from"]) for row in rows[:4]] == [0, 0.05, 0.1, 0.5]
    assert [row["kind"] for row in rows] == ["nll"] * 4 + ["nelbo"] * 4
    for row in rows:
        assert float(row["low"]) == pytest.approx(float(row["loss"]) - 0.1)
        assert float(row["high"]) == pytest.approx(float(row["loss"]) + 0.1)
    assert "masked token (columns nll_at_noise) of masked" in drawn.notes[0]
    assert "terms of the bound per token (columns nelbo_at_noise) of hybrid" in drawn.notes[0]
    assert drawn.notes[-1].endswith("ar_s1, ar_s2.")
    assert set(COLORS[:2]) <= colors_in(tmp_path / "f.png")


def test_a_panel_for_every_step(tmp_path: Path) -> None:
    study, results = made_study(AXES, profiled)
    spec = NoiseProfileSpec(lines="objective", steps=(40, 160), only={"objective": ("masked",)})
    drawn = draw(spec, results, study, tmp_path / "f")
    assert [row[0] for row in drawn.rows] == ["step 40", "step 160"]
    assert [row[3] for row in drawn.rows] == ["3.600", "1.725"]


def test_ranges_that_a_seed_lacks_are_left_out(tmp_path: Path) -> None:
    def holey(place: Any) -> list[dict[str, Any]]:
        rows = profiled(place)
        if place["seed"] == "s1":
            rows[-1]["nll_at_noise_0-0.05"] = None
        return rows

    study, results = made_study(AXES, holey)
    spec = NoiseProfileSpec(lines="objective", only={"objective": ("masked",)})
    drawn = draw(spec, results, study, tmp_path / "f")
    assert drawn.header[3] == "noise 0.05 to 0.1"
    assert drawn.rows[0][3] == "1.800"


def buckets(edges: tuple[float, ...], value: float) -> dict[str, float]:
    """Columns of these ranges; 0, 0.5, 1 are two."""
    return {f"nll_at_noise_{low:.4g}-{high:.4g}": value + high for low, high in pairwise(edges)}


def test_seeds_without_a_common_range_are_left_out_and_named(tmp_path: Path) -> None:
    def unlike(place: Any) -> list[dict[str, Any]]:
        rows = curve(lambda s: 3.0 + 0 * s, num_steps=80)
        is_odd = (place["objective"], place["seed"]) == ("hybrid", "s2")
        edges = (0.0, 0.3, 0.6, 1.0) if is_odd else (0.0, 0.25, 0.5, 0.75, 1.0)
        return [{**row, **buckets(edges, 1.0)} for row in rows]

    study, results = made_study(AXES, unlike)
    spec = NoiseProfileSpec(lines="objective", only={"objective": ("masked", "hybrid")})
    drawn = draw(spec, results, study, tmp_path / "f")
    assert [row[1] for row in drawn.rows] == ["masked"]
    said = "Left out, for they share no range of the noise: hybrid_s1, hybrid_s2."
    assert drawn.notes[-1] == said
    alone = NoiseProfileSpec(lines="objective", only={"objective": ("hybrid",)})
    with pytest.raises(ValueError, match=f"no run has a noise profile at its last step. {said}"):
        draw(alone, results, study, tmp_path / "g")


def test_lines_of_other_ranges_have_columns_of_their_own(tmp_path: Path) -> None:
    grids = {"masked": tuple(place / 10 for place in range(11)), "hybrid": (0.0, 0.5, 1.0)}

    def unlike(place: Any) -> list[dict[str, Any]]:
        rows = curve(lambda s: 3.0 + 0 * s, num_steps=80)
        return [{**row, **buckets(grids[place["objective"]], 1.0)} for row in rows]

    study, results = made_study({"objective": labels("masked", "hybrid")}, unlike)
    drawn = draw(NoiseProfileSpec(lines="objective"), results, study, tmp_path / "f")
    rows = [dict(zip(drawn.header, row, strict=True)) for row in drawn.rows]
    assert rows[0] == {
        **{"panel": "", "line": "masked", "seeds": "1"},
        **{"noise 0 to 0.1": "1.100", "noise 0.5 to 0.6": "1.600", "noise 0.9 to 1": "2.000"},
        **{"noise 0 to 0.5": "", "noise 0.5 to 1": "", "mean over the noise": "1.550"},
    }
    assert (rows[1]["noise 0 to 0.5"], rows[1]["noise 0.5 to 1"]) == ("1.500", "2.000")
    assert rows[1]["noise 0.5 to 0.6"] == ""


def test_missing_profiles_are_errors(tmp_path: Path) -> None:
    study, results = made_study(AXES, profiled)
    with pytest.raises(ValueError, match=r"no run has a noise profile at step 41; .* 40 to 200"):
        draw(NoiseProfileSpec(lines="objective", steps=(41,)), results, study, tmp_path / "f")
    only_ar = NoiseProfileSpec(lines="objective", only={"objective": ("ar",)})
    with pytest.raises(ValueError, match="no run has a noise profile at its last step"):
        draw(only_ar, results, study, tmp_path / "f")
    with pytest.raises(ValueError, match="masked_s1 and hybrid_s1 have one place"):
        draw(NoiseProfileSpec(), results, study, tmp_path / "f")
    study, bare = made_study({"seed": labels("s1")}, lambda place: curve(lambda s: 3.0 + 0 * s))
    with pytest.raises(ValueError, match=r"results\.csv has no columns nll_at_noise .*buckets"):
        draw(NoiseProfileSpec(), bare, study, tmp_path / "f")
    with pytest.raises(ValueError, match="steps and panels objective both ask for panels"):
        NoiseProfileSpec(steps=(40,), panels="objective")
