"""Scores of checkpoints in the table of a study: their names, their rows, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_runs import write_run, write_study

from megatron_dlm.scaling.gather import gather
from megatron_dlm.scaling.results import Results, curve_of
from megatron_dlm.scaling.run_evaluations import with_evaluations
from megatron_dlm.scaling.study import read_study

REPORTS: list[dict[str, Any]] = [
    {"step": 2, "split": "train", "loss": 3.0, "tokens": 64, "epoch": 0.5},
    {"step": 2, "split": "valid", "loss": 2.5, "nelbo": 2.5, "tokens": 64, "epoch": 0.5},
    {"step": 3, "split": "train", "loss": 2.9, "tokens": 96, "epoch": 0.75},
    {"step": 4, "split": "valid", "loss": 2.0, "nelbo": 2.0, "tokens": 128, "epoch": 1.0},
]
QUIZ = {
    "alias": "quiz",
    **{"acc,none": 0.25, "acc_stderr,none": 0.02, "acc,strict": 0.125},
    **{"bleu_stderr,none": "N/A", "is_fast,none": True},
}


def tasks(step: int | None, results: dict[str, Any], groups: Any = None) -> dict[str, Any]:
    """A tasks.json of `evaluate`, as far as it is read."""
    gap = {"nats": 0.5, "standard_error": 0.1, "nats_per_byte": 0.05}
    gap |= {"nats_per_byte_standard_error": None, "num_questions": 9}
    return {
        **{"step": step, "results": results, "delta_nll": dict.fromkeys(results, gap)},
        "lm_eval": {"group_subtasks": groups or {name: [] for name in results}},
    }


def data(step: int, *prefixes: str) -> dict[str, Any]:
    """A data.json of `evaluate`, as far as it is read."""
    score = {"nats_per_token": 2.25, "standard_error": None, "bits_per_byte": 1.5}
    score["bits_per_byte_standard_error"] = 0.25
    return {"step": step, "data": [{"prefix": prefix, **score} for prefix in prefixes]}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has reported."""
    study = read_study(write_study(tmp_path))
    folder = tmp_path / "out" / "runs" / study.runs[0].name
    write_run(folder, study.runs[0], REPORTS)
    return folder


def gathered(run: Path, split: str = "valid") -> tuple[Results, list[str]]:
    study = read_study(run.parents[2] / "study.yaml")
    found = gather(study, run.parent, split=split)
    return Results(tuple(found.table.to_pylist())), found.warnings


def test_scores_stand_beside_the_validation_of_their_step(run: Path) -> None:
    write(run / "evaluations" / "iter_0000004" / "tasks.json", tasks(4, {"quiz": QUIZ}))
    write(run / "evaluations" / "iter_0000004" / "data.json", data(4, "a/web", "a/code"))
    results, warnings = gathered(run)
    assert warnings == []
    before, after = results.rows
    found = {name: after[name] for name in results.columns if "/" in name}
    assert found == {
        **{"quiz/acc": 0.25, "quiz/acc_stderr": 0.02, "quiz/acc/strict": 0.125},
        **{"quiz/delta_nll": 0.5, "quiz/delta_nll_stderr": 0.1, "quiz/delta_nll_per_byte": 0.05},
        **{"web/nelbo": 2.25, "web/bits_per_byte": 1.5, "web/bits_per_byte_stderr": 0.25},
        **{"code/nelbo": 2.25, "code/bits_per_byte": 1.5, "code/bits_per_byte_stderr": 0.25},
    }
    assert all(before[name] is None for name in found)
    assert (after["step"], after["nelbo"]) == (4, 2.0)


def test_a_checkpoint_without_validation_has_the_place_of_its_training_report(run: Path) -> None:
    for step, score in ((2, 0.25), (3, 0.5)):
        report = tasks(step, {"quiz": {"acc,none": score}})
        write(run / "evaluations" / f"iter_{step:07d}" / "tasks.json", report)
    results, warnings = gathered(run)
    assert warnings == []
    assert [row["step"] for row in results.rows] == [2, 3, 4]
    alone = results.rows[1]
    assert (alone["split"], alone["tokens"], alone["epoch"]) == ("valid", 96, 0.75)
    assert (alone["nelbo"], alone["loss"], alone["quiz/acc"]) == (None, None, 0.5)
    assert alone["training_flops"] == 96 * alone["training_flops_per_token"]
    (rows,) = results.runs().values()
    losses, scores = curve_of(rows, "tokens", "nelbo"), curve_of(rows, "epoch", "quiz/acc")
    assert losses is not None
    assert scores is not None
    assert (losses.x.tolist(), losses.y.tolist()) == ([64, 128], [2.5, 2.0])
    assert (scores.x.tolist(), scores.y.tolist()) == ([0.5, 0.75], [0.25, 0.5])


def test_a_step_that_nothing_reports_is_left_out(run: Path) -> None:
    for step in (5, 7):
        write(run / "evaluations" / f"iter_{step:07d}" / "data.json", data(step, "web"))
    results, (warning,) = gathered(run)
    assert [row["step"] for row in results.rows] == [2, 4]
    assert warning == (
        f"{run.name}: left out evaluations at step 5, 7, where metrics.jsonl has no report; "
        "save at steps of validation.interval_steps"
    )


def test_training_reports_have_no_scores(run: Path) -> None:
    write(run / "evaluations" / "iter_0000002" / "data.json", data(2, "web"))
    assert "web/nelbo" not in gathered(run, "train")[0].columns
    rows = gathered(run, "all")[0].rows
    found = [(row["step"], row["split"], row["web/nelbo"]) for row in rows]
    assert found == [(2, "train", None), (2, "valid", 2.25), (3, "train", None), (4, "valid", None)]


def test_folders_between_give_the_column_their_name(run: Path) -> None:
    """0 and 5 shots of one task are two columns."""
    write(run / "evaluations" / "tasks.json", tasks(4, {"quiz": {"acc,none": 0.25}}))
    few = run / "evaluations" / "5_shot" / "iter_0000004" / "tasks.json"
    write(few, tasks(4, {"quiz": {"acc,none": 0.75}}))
    results, warnings = gathered(run)
    assert warnings == []
    assert results.rows[1]["quiz/acc"] == 0.25
    assert results.rows[1]["5_shot/quiz/acc"] == 0.75


def test_the_same_score_twice_is_named(run: Path) -> None:
    write(run / "evaluations" / "iter_0000004" / "data.json", data(4, "web"))
    write(run / "evaluations" / "data.json", data(4, "web"))
    results, (warning,) = gathered(run)
    assert results.rows[1]["web/nelbo"] == 2.25
    assert "evaluations/iter_0000004/data.json has web/nelbo of step 4 once more" in warning
    assert "give evaluations of other settings a folder with a name" in warning


def test_parts_of_a_group_are_in_its_own_score(run: Path) -> None:
    names = ("mmlu", "mmlu_law", "mmlu_art", "sum", "sum_a", "quiz")
    results: dict[str, Any] = {name: {"acc,none": 0.25} for name in names}
    results["sum"] = {"alias": "sum"}  # a group without a score of its own
    groups = {"mmlu": ["mmlu_law", "mmlu_art"], "sum": ["sum_a"], "quiz": []}
    write(run / "evaluations" / "tasks.json", tasks(4, results, groups))
    found, _ = gathered(run)
    accuracies = [name for name in found.columns if name.endswith("/acc")]
    assert accuracies == ["mmlu/acc", "quiz/acc", "sum_a/acc"]


def test_datasets_of_one_name_keep_their_prefixes(run: Path) -> None:
    write(run / "evaluations" / "data.json", data(4, "a/valid", "b/valid", "c/test"))
    columns = gathered(run)[0].columns
    assert [name for name in columns if name.endswith("/nelbo")] == [
        *("a/valid/nelbo", "b/valid/nelbo", "test/nelbo")
    ]


def test_what_is_no_report_is_left_out_with_its_name(run: Path) -> None:
    folder = run / "evaluations"
    write(folder / "a" / "tasks.json", {"step": 4})
    write(folder / "b" / "data.json", [1])
    write(folder / "c" / "data.json", data(4, "web") | {"step": None})  # of an export
    (folder / "d").mkdir()
    (folder / "d" / "tasks.json").write_text('{"step": 4, "res')
    write(folder / "other.json", {"step": 4})
    warnings: list[str] = []
    assert list(with_evaluations(REPORTS, run, warnings)) == REPORTS
    assert warnings == [
        f"{run.name}: evaluations/a/tasks.json is no report of `evaluate` and was left out",
        f"{run.name}: evaluations/b/data.json is no report of `evaluate` and was left out",
        f"{run.name}: evaluations/c/data.json is not of a checkpoint and was left out",
        f"{run.name}: evaluations/d/tasks.json is no report of `evaluate` and was left out",
    ]
