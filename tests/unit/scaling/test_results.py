"""Reading tables of results, and taking runs and curves from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.scaling.results import Results, curve_of, number, read_results


def row(step: int, nelbo: float | None, **values: Any) -> dict[str, Any]:
    fixed = {"study": "a", "run": "r", "split": "valid"}
    return {**fixed, "step": step, "tokens": 10 * step, "nelbo": nelbo, **values}


def test_runs_are_their_validations_by_step() -> None:
    rows = [row(3, 1.0), row(1, 3.0), row(2, 2.5), row(2, 2.0), row(4, 9.0, split="train")]
    rows.append(row(1, 5.0, run="q"))
    found = Results(tuple(rows)).runs()
    assert list(found) == ["r", "q"]
    # Step 2 was reported again after a rollback: the later report counts.
    assert [(one["step"], one["nelbo"]) for one in found["r"]] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_runs_of_several_studies_are_told_apart() -> None:
    results = Results((row(1, 1.0), row(1, 2.0, study="b")))
    assert list(results.runs()) == ["a/r", "b/r"]


def test_curves_leave_out_what_cannot_be_drawn() -> None:
    rows = [row(1, 3.0), row(2, None), row(3, float("nan")), row(4, 2.0), row(5, 1.5, tokens=40)]
    curve = curve_of(rows, "tokens", "nelbo")
    assert curve is not None
    assert curve.x.tolist() == [10, 40]
    assert curve.y.tolist() == [3.0, 2.0]
    assert curve_of(rows[:2], "tokens", "nelbo") is None
    assert curve_of(rows, "epoch", "nelbo") is None


def test_numbers_are_finite_numbers() -> None:
    values = {"whole": 3, "text": "3", "yes": True, "far": float("inf"), "none": None}
    found = {name: number(values, name) for name in (*values, "missing")}
    assert found == {**dict.fromkeys(values), "missing": None, "whole": 3.0}


def test_columns_must_have_values() -> None:
    results = Results((row(1, 1.0, lr=None),), "table.csv")
    results.check_columns("nelbo", "tokens")
    with pytest.raises(ValueError, match=r"table\.csv: no row has a value of lr; have: study, run"):
        results.check_columns("nelbo", "lr")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "missing.csv does not exist; make it with `megatron-dlm study gat"),
        ("table.txt", "a,b\n1,2\n", "a table of results ends in .csv or .parquet"),
        ("table.csv", "study,run,step\na,r,1\n", "has no column split; it is no table of"),
        ("table.csv", "a,b\n1,2\n3\n", "is no .csv table"),
        ("table.csv", "", "is no .csv table"),
        ("table.parquet", "study,run\n", "is no .parquet table"),
    ],
)
def test_what_is_no_table(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        read_results(tmp_path / name)
    assert message in str(caught.value)


def test_tables_follow_each_other(tmp_path: Path) -> None:
    for study in ("a", "b"):
        text = f"study,run,step,split,nelbo,lr\n{study},r,1,valid,,1e-3\n"
        (tmp_path / f"{study}.csv").write_text(text)
    results = read_results(tmp_path / "a.csv", tmp_path / "b.csv")
    assert [(one["study"], one["nelbo"], one["lr"]) for one in results.rows] == [
        ("a", None, 1e-3),
        ("b", None, 1e-3),
    ]


def test_one_run_in_two_tables_is_refused(tmp_path: Path) -> None:
    """Sorted by step, two runs of one name would become one curve."""
    head = "study,run,step,split,nelbo\n"
    (tmp_path / "one.csv").write_text(head + "a,q,10,valid,3.0\na,r,20,valid,2.5\n")
    (tmp_path / "two.csv").write_text(head + "a,r,15,valid,9.0\na,p,20,valid,8.5\n")
    with pytest.raises(ValueError, match=r"two\.csv: run r of study a is in .*one\.csv too, and"):
        read_results(tmp_path / "one.csv", tmp_path / "two.csv")
    # Another split of the same runs is no second run.
    (tmp_path / "two.csv").write_text(head + "a,r,15,train,9.0\n")
    assert len(read_results(tmp_path / "one.csv", tmp_path / "two.csv").rows) == 3


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("3,valid,2.0\nx,valid,2.5", "row 3: step is 'x'; expected a whole number"),
        ("3,valid,2.0\n1.5,valid,2.5", "row 3: step is 1.5; expected a whole number"),
        ("3,valid,\n,valid,2.5", "row 3: step is None; expected a whole number"),
        ("3,valid,2.0\n4,valid,abc", "row 3: nelbo is 'abc'; expected a number or nothing"),
    ],
)
def test_text_where_a_number_belongs(tmp_path: Path, cells: str, message: str) -> None:
    rows = "".join(f"a,r,{line}\n" for line in cells.split("\n"))
    (tmp_path / "table.csv").write_text("study,run,step,split,nelbo\n" + rows)
    with pytest.raises(ValueError, match=r"table\.csv row 3: ") as caught:
        read_results(tmp_path / "table.csv")
    assert message in str(caught.value)


def test_an_axis_may_have_the_name_of_a_metric(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("study,run,step,split,loss\na,r,1,valid,mean\n")
    assert read_results(tmp_path / "table.csv", text_columns=["loss"]).rows[0]["loss"] == "mean"
