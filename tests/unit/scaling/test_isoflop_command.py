"""`scaling fit --law isoflop`: which budgets count, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scaling_command import Capture, refused, scaling
from scaling_tables import reports, size_study, write_table

from megatron_dlm.scaling.law_file import read_law

AR = {"only.objective": "ar"}


def told(file: Path) -> str:
    """The notes of the first fit."""
    return " / ".join(read_law(file).fits[0].notes)


def test_budgets_that_do_not_count_are_named(tmp_path: Path, capsys: Capture) -> None:
    """Three sizes leave nothing to judge a parabola by, and no run comes to the largest budget."""
    rows = [
        row
        for row in size_study()
        if row["num_parameters_without_embeddings"] < 6e7
        or row["tokens"] * row["flops_per_token_six_p_and_attention"] > 3e18
    ]
    table, law = write_table(tmp_path / "sizes.csv", rows), tmp_path / "law.json"
    flags: dict[str, Any] = {"results": table, "law": "isoflop", "output": law, "resamples": 100}
    budgets = [1e18, 2e18, 4e18, 1e19, 3e19, 1e25]
    for weighting in ("equal", "precision"):
        assert scaling("fit", **flags, **AR, budgets=budgets, weighting=weighting) == 0
        for text in (told(law), capsys.readouterr().out):
            assert "1e+18 FLOPs left out: 3 runs at 3 settings leave nothing to judge" in text
            assert "2e+18 FLOPs left out: 3 runs" in text
            assert "1e+25 FLOPs left out: no run has a loss there" in text
        (fit,) = read_law(law).fits
        assert [point["training_flops"] for point in fit.points] == [4e18, 1e19, 3e19]
        exponent = fit.numbers["flops_per_token_exponent"]
        assert exponent.high - exponent.low > 0.01
    assert read_law(law).source.settings["budgets"] == budgets
    # Those that the command chooses itself lie where four sizes overlap.
    assert scaling("fit", **flags, **AR, num_budgets=4) == 0
    (fit,) = read_law(law).fits
    assert len(fit.points) == 4
    assert min(point["num_models"] for point in fit.points) >= 4
    assert read_law(law).source.settings["num_budgets"] == 4
    line = refused(capsys, "fit", **flags, **AR, budgets=[1e18, 2e18, 1e25])
    assert "0 budgets have a best size; laws need two: 1e+18 FLOPs, 2e+18 FLOPs: 3 runs" in line


def test_a_budget_counts_for_both_sizes_or_none(tmp_path: Path, capsys: Capture) -> None:
    """At the last budget the best size lies within those trained in FLOPs per token only. One
    resample of both could not come from different budgets."""

    def flops_of(parameters: float) -> float:
        return 6.6 * parameters * (1 + 3 * (parameters / (1e7 * 4**5)) ** 0.8)

    def loss(parameters: float, unique: float, epochs: float) -> float:
        decades = np.log10(flops_of(parameters) * unique * epochs / 1e18)
        off = np.log(parameters / 1e7) / np.log(4) - 2 - 2 * decades
        return float(3 * 10 ** (-0.05 * decades) + 0.05 * off**2)

    rows = []
    for place in range(6):
        parameters = 1e7 * 4.0**place
        per_token = flops_of(parameters)
        size: dict[str, Any] = {"parameters": parameters, "tokens": 5e19 / per_token}
        of_run = reports(
            f"p{place}", **size, unique_tokens=1e15, loss=loss, noise=0.003, seed=place + 7
        )
        rows += [dict(row, flops_per_token_six_p_and_attention=per_token) for row in of_run]
    table, law = write_table(tmp_path / "sizes.csv", rows), tmp_path / "law.json"
    budgets = [1e18, 3e18, 1e19, 4e19]
    assert scaling("fit", results=table, law="isoflop", output=law, budgets=budgets) == 0
    (fit,) = read_law(law).fits
    assert [point["training_flops"] for point in fit.points] == budgets[:3]
    assert told(law).startswith("4e+19 FLOPs left out: the best, 1.")
    flags: dict[str, Any] = {"results": table, "law": "isoflop", "output": law}
    assert "(sizes in parameters)" in told(law)
    line = refused(capsys, "fit", **flags, budgets=budgets[2:])
    assert "laws need two: 4e+19 FLOPs: the best, 1." in line
