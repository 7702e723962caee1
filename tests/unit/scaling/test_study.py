"""Studies: expansion, stable names, refusals, cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dlm import cli
from megatron_dlm.models.accounting import training_flops_per_token
from megatron_dlm.scaling.study import read_study
from megatron_dlm.scaling.study_plan import sweep_list

BASE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 50}
objective: {mask_token_id: 49}
data: {train: {text: 1.0}, unique_tokens: 1600}
train: {steps: 10, global_batch_size: 4, precision: fp32, device: cpu}
schedule: {warmup_steps: 1}
"""
STUDY = """
name: small
question: Does it expand?
base: base.yaml
set: {optimizer.lr: 1.0e-3, data.train: {text: 1.0, more: 0.5}}
axes:
  objective:
    ar: {objective.kind: autoregressive}
    masked: {objective.kind: masked}
  size:
    small:
    wide: {model.hidden_size: 64}
  seed: {s1: {train.seed: 1}, s2: {train.seed: 2}}
leave_out: [{objective: ar, size: wide}, {objective: ar, seed: s2}]
"""


def write(folder: Path, study: str = STUDY) -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "study.yaml"
    path.write_text(study)
    return path


def test_expansion(tmp_path: Path) -> None:
    study = read_study(write(tmp_path))
    assert [run.name for run in study.runs] == [
        "ar_small_s1",
        "masked_small_s1",
        "masked_small_s2",
        "masked_wide_s1",
        "masked_wide_s2",
    ]
    last = study.runs[-1]
    assert last.labels == {"objective": "masked", "size": "wide", "seed": "s2"}
    config = study.configs(tmp_path / "runs")[last.name]
    assert (config.model.hidden_size, config.train.seed, config.optimizer.lr) == (64, 2, 1e-3)
    assert config.data.train == {"text": 1.0, "more": 0.5}
    assert config.train.output_dir == str(tmp_path / "runs" / last.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("axes:", "axis:"), "unknown key axis"),
        (("s1: {train.seed: 1}", "s_1: {}"), "axes.seed has the label 's_1'; labels become names"),
        (
            ("[{objective: ar, size: wide}", "[{objective: br}"),
            "leave_out entry 1 names objective: br, wh",
        ),
        (
            ("[{objective: ar, size: wide}", "[{nope: []}"),
            "leave_out entry 1 names nope, which is no",
        ),
        (
            ("[{objective: ar, size: wide}", "[{seed: []}"),
            "leave_out entry 1 names no label of seed",
        ),
        (
            ("[{objective: ar, size: wide}", "[{seed: [[1]]}"),
            "leave_out entry 1 names seed: [1], which is",
        ),
        (
            ("[{objective: ar, size: wide}", "[{seed: {s1: 1}}"),
            "leave_out entry 1 names seed: {'s1': 1}, ",
        ),
        (
            ("s2: {train.seed: 2}", "s1: {train.seed: 2}"),
            "not valid YAML: line 13: s1 is given twic",
        ),
        (
            ("  size:\n", "  runs:\n"),
            "axes has the name runs, but in settings {runs} is the folder",
        ),
        (("s1: {train.seed: 1}", "s1: {1: 1}"), "axes.seed.s1: unknown key 1"),
        (("set: {", "set: {1: 2, "), "set: unknown key 1"),
        (("name: small", "1: small\nother: 3"), "unknown key 1 (have: name, question"),
        (
            ("model.hidden_size: 64", "model.hiden_size: 64"),
            "axes.size.wide: unknown key model.hid",
        ),
        (
            ("set: {", "set: {train.output_dir: x, "),
            "set: train.output_dir is given, but every run",
        ),
        (
            ("s2: {train.seed: 2}", "s2: {train.seed: 1}"),
            "masked_small_s1 and masked_small_s2 have",
        ),
        (("ar, seed: s2}", "ar, seed: 2}"), "leave_out entry 2 names seed: 2, which is no label"),
        (
            ("ar, seed: s2}", "ar, sed: s2}"),
            "entry 2 names sed, which is no axis; did you mean seed",
        ),
        (("base: base.yaml", "base: 3"), "base is 3; expected a file"),
        (("small:\n", "small: 4\n"), "axes.size.small is 4; expected settings"),
        (("question: Does", "question: [Does"), "not valid YAML"),
    ],
)
def test_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = write(tmp_path, STUDY.replace(*change))
    with pytest.raises(ValueError, match=r"study\.yaml") as caught:
        read_study(path)
    assert message in str(caught.value)


def test_a_wrong_setting_names_its_run(tmp_path: Path) -> None:
    study = read_study(
        write(tmp_path, STUDY.replace("model.hidden_size: 64", "model.hidden_size: x"))
    )
    with pytest.raises(ValueError, match=r"run masked_wide_s1: .*model\.hidden_size"):
        study.configs(tmp_path)


def test_plan_writes_the_list_and_the_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    arguments = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "plan", *arguments]) == 0
    lines = (tmp_path / "out" / "sweep.txt").read_text().splitlines()
    assert lines[0] == "# small: Does it expand?"
    assert lines[1].startswith(f"ar_small_s1  --config {tmp_path}/base.yaml --optimizer.lr 0.001 ")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    study = read_study(path)
    wanted = 0.0
    for config, cost in zip(study.configs(tmp_path).values(), plan["runs"], strict=True):
        tokens = 10 * 4 * 16
        assert cost["tokens"] == tokens
        per_token = training_flops_per_token(config.model, config.objective).total
        assert cost["training_flops"] == pytest.approx(tokens * per_token)
        wanted += cost["training_flops"]
    assert plan["gpu_hours"] == pytest.approx(wanted / (0.4 * 989e12) / 3600)
    assert "--array=0-4" in capsys.readouterr().out


def test_epochs_of_a_budget_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path, STUDY.replace("optimizer.lr: 1.0e-3", "train.steps: null, train.epochs: 3")
    )
    arguments = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "plan", *arguments]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {cost["tokens"] for cost in plan["runs"]} == {3 * 1600}


def test_a_question_of_several_lines_is_one_comment(tmp_path: Path) -> None:
    """Every other line of sweep.txt is a run of the job array."""
    question = "question: |\n  First line:\n  second line?\n"
    path = write(tmp_path, STUDY.replace("question: Does it expand?\n", question))
    arguments = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "plan", *arguments]) == 0
    first, *others = (tmp_path / "out" / "sweep.txt").read_text().splitlines()
    assert first == "# small: First line: second line?"
    assert [line.split()[0] for line in others] == [run.name for run in read_study(path).runs]


def test_a_line_break_in_a_setting_cannot_be_listed(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY.replace("set: {", 'set: {data.tokenizer: "a\\nb", '))
    with pytest.raises(ValueError, match="run ar_small_s1: a setting has a line break"):
        sweep_list(read_study(path), tmp_path)


def test_merged_labels_are_not_given_twice(tmp_path: Path) -> None:
    """YAML's own way to share settings, also where a label changes what it takes over."""
    text = STUDY.replace("s1: {train.seed: 1}", "s1: &first {train.seed: 1, train.steps: 20}")
    text = text.replace("s2: {train.seed: 2}", "s2: {<<: *first, train.seed: 2}")
    runs = {run.name: run.settings for run in read_study(write(tmp_path, text)).runs}
    assert runs["masked_wide_s2"]["train.seed"] == 2
    assert runs["masked_wide_s2"]["train.steps"] == 20
