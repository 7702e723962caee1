"""The tidy table of a study: its columns, its values, and what it says of broken runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_runs import LINES, write_run, write_runs, write_study

from megatron_dlm import cli
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.scaling.flops import training_flops
from megatron_dlm.scaling.gather import gather
from megatron_dlm.scaling.results import Results, read_results
from megatron_dlm.scaling.study import read_study
from megatron_dlm.training.status import write_status

COLUMNS = [
    *("study", "run", "objective", "unique", "seed"),
    *("objective.kind", "data.unique_tokens", "train.seed"),
    *("num_parameters", "training_flops_per_token", "unique_tokens"),
    *("commit", "uncommitted_changes", "num_parameters_without_embeddings"),
    *("flops_per_token_six_n", "flops_per_token_six_p_and_attention"),
    *("step", "split", "tokens", "training_flops", "epoch"),
    *("nelbo", "loss", "grad_norm", "nll_at_noise_0.0-0.1", "seen_unique_tokens"),
]
REPORTS = [
    {"step": 1, "split": "train", "loss": 3.0, "grad_norm": 1, "tokens": 64, "epoch": 0.04},
    {
        **{"step": 2, "split": "valid", "loss": 2.25, "nelbo": 2.5, "tokens": 128, "epoch": 0.08},
        **{"unique_tokens": 128, "nll_at_noise_0.0-0.1": None},
    },
]


def one_run(tmp_path: Path, name: str = "masked_u2_s1", text: str = LINES) -> Path:
    """A study of which one run has reported; the folder of the run."""
    study = read_study(write_study(tmp_path, text))
    (run,) = [run for run in study.runs if run.name == name]
    write_run(tmp_path / "out" / "runs" / name, run, REPORTS)
    return tmp_path / "out" / "runs" / name


def gathered(tmp_path: Path, split: str = "all") -> tuple[Results, list[str]]:
    found = gather(read_study(tmp_path / "study.yaml"), tmp_path / "out" / "runs", split=split)
    return Results(tuple(found.table.to_pylist())), found.warnings


def test_columns_and_values(tmp_path: Path) -> None:
    one_run(tmp_path)
    results, warnings = gathered(tmp_path)
    assert warnings == []
    assert results.columns == tuple(COLUMNS)
    train, valid = results.rows
    assert (train["nelbo"], train["seen_unique_tokens"], train["grad_norm"]) == (None, None, 1.0)
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16, vocab_size=50
    )
    flops = training_flops(model, ObjectiveConfig(mask_token_id=49))
    assert valid == {
        **{"study": "lines", "run": "masked_u2_s1"},
        **{"objective": "masked", "unique": "u2", "seed": "s1"},
        **{"objective.kind": "masked", "data.unique_tokens": 3200, "train.seed": 1},
        **{"num_parameters": 7000, "training_flops_per_token": 1000.0, "unique_tokens": 3200},
        **{"commit": "0123456789abcdef", "uncommitted_changes": False},
        "num_parameters_without_embeddings": valid["num_parameters_without_embeddings"],
        "flops_per_token_six_n": flops.six_n,
        "flops_per_token_six_p_and_attention": flops.six_p_and_attention,
        **{"step": 2, "split": "valid", "tokens": 128, "training_flops": 128_000.0},
        **{"epoch": 0.08, "nelbo": 2.5, "loss": 2.25, "grad_norm": None},
        **{"nll_at_noise_0.0-0.1": None, "seen_unique_tokens": 128.0},
    }
    embedding = 2 * 32 * model.padded_vocab_size
    assert valid["num_parameters_without_embeddings"] == flops.six_n / 6 - embedding / 2


def test_only_one_split(tmp_path: Path) -> None:
    one_run(tmp_path)
    assert [row["step"] for row in gathered(tmp_path, "valid")[0].rows] == [2]
    assert [row["step"] for row in gathered(tmp_path, "train")[0].rows] == [1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_read_as_it_was_gathered(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where labels look like numbers, like nothing, or like yes."""
    labels = '{"1e3": {train.seed: 1}, "nan": {train.seed: 2}, "true": {train.seed: 3}}'
    text = LINES.replace("{s1: {train.seed: 1}, s2: {train.seed: 2}}", labels)
    path = write_study(tmp_path, text)
    write_runs(path, tmp_path / "out", last_epoch=3, score=lambda run, epoch: 1 / (3 * epoch))
    output = tmp_path / f"table{suffix}"
    flags = ["--study", str(path), "--output_dir", str(tmp_path / "out"), "--output", str(output)]
    assert cli.main(["study", "gather", *flags]) == 0
    assert f"{output}: 36 rows of 12 of 12 runs" in capsys.readouterr().out
    read = read_results(output, text_columns=("objective", "unique", "seed"))
    assert read.rows == gathered(tmp_path, "valid")[0].rows
    assert {row["seed"] for row in read.rows} == {"1e3", "nan", "true"}
    assert list((tmp_path).glob(".*.tmp")) == []


def test_status_has_a_line_for_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_run(tmp_path)
    flags = ["--study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "status", *flags]) == 0
    output = capsys.readouterr().out
    assert output.count("not begun") == 7 + 1
    assert "7 not begun, 1 finished" in output


def test_status_says_what_it_would_not_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_run(tmp_path)
    path = tmp_path / "study.yaml"
    flags = ["--study", str(path), "--output_dir"]
    assert cli.main(["study", "status", *flags, str(tmp_path / "nowhere")]) == 2
    assert f"output_dir {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err
    path.write_text(path.read_text().replace("{train.seed: 1}", "{train.seed: 5}"))
    assert cli.main(["study", "status", *flags, str(tmp_path / "out")]) == 0
    wanted = "warning: masked_u2_s1: was trained with train.seed 1, the study says 5"
    assert wanted in capsys.readouterr().out


def test_runs_that_all_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    folder = tmp_path / "out/runs/ar_u1_s1"
    folder.mkdir(parents=True)
    write_status(folder, "failed", 0, "the data has gone")
    flags = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "gather", *flags]) == 2
    error = capsys.readouterr().err
    assert (
        "no run of lines has reported anything; failed: ar_u1_s1 (`study status` says why)" in error
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    flags = ["--study", str(path), "--output_dir", "/proc/nowhere"]
    assert cli.main(["study", "plan", *flags]) == 2
    assert "output_dir /proc/nowhere cannot be made" in capsys.readouterr().err


def test_nothing_to_gather(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    flags = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "gather", *flags]) == 2
    assert "no run of lines has reported anything; run it first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the study says of a run that was trained otherwise is not believed."""
    folder = one_run(tmp_path)
    config = (folder / "config.yaml").read_text()
    assert "  unique_tokens: 3200\n" in config
    (folder / "config.yaml").write_text(config.replace("unique_tokens: 3200", "unique_tokens: 9"))
    flags = ["--study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "gather", *flags]) == 0
    output = capsys.readouterr().out
    wanted = "warning: masked_u2_s1: was trained with data.unique_tokens 9, the study says 3200"
    assert wanted in output
    assert gathered(tmp_path)[0].rows[0]["data.unique_tokens"] == 9


def test_numbers_that_yaml_takes_for_text_contradict_nothing(tmp_path: Path) -> None:
    text = LINES.replace("s1: {train.seed: 1}", "s1: {optimizer.lr: 1e-3, data.train: {a: 1.0}}")
    folder = one_run(tmp_path, text=text)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("lr: 1e-3", "lr: 0.001"))
    results, warnings = gathered(tmp_path)
    assert warnings == []
    assert results.rows[0]["optimizer.lr"] == 0.001
    assert "data.train" not in results.columns  # a mapping is no column


def test_settings_of_all_runs_are_compared_too(tmp_path: Path) -> None:
    """What no axis changes is no column, and still no run may differ in it unseen."""
    text = LINES.replace("axes:", "set: {train.steps: 40, data.train: {text: 1}}\naxes:")
    study = read_study(write_study(tmp_path, text))
    for run in study.runs:
        write_run(tmp_path / "out" / "runs" / run.name, run, REPORTS)
    assert gathered(tmp_path)[1] == []
    (tmp_path / "study.yaml").write_text(text.replace("train.steps: 40", "train.steps: 80"))
    results, (warning,) = gathered(tmp_path)
    assert warning == (
        "ar_u1_s1, ar_u1_s2, ar_u2_s1 and 5 more: were trained with train.steps 40, "
        "the study says 80"
    )
    assert "train.steps" not in results.columns
    (tmp_path / "study.yaml").write_text(text.replace("{text: 1}", "{text: 1, b: 2}"))
    (warning,) = gathered(tmp_path)[1]
    assert warning.endswith("data.train {'text': 1}, the study says {'text': 1.0, 'b': 2.0}")


def test_files_of_the_study_are_compared_as_well(tmp_path: Path) -> None:
    """The base, and what no file gives: a run has a value of every setting."""
    folder = one_run(tmp_path)
    config = (folder / "config.yaml").read_text()
    changed = config.replace("global_batch_size: 4", "global_batch_size: 8")
    (folder / "config.yaml").write_text(changed + "optimizer: {lr: 0.5}\nlogging: {rich: x}\n")
    rate, batch = gathered(tmp_path)[1]
    assert batch == "masked_u2_s1: was trained with train.global_batch_size 8, the study says 4"
    assert rate.startswith("masked_u2_s1: was trained with optimizer.lr 0.5, the study says ")


def test_what_a_run_fills_in_contradicts_nothing(tmp_path: Path) -> None:
    text = LINES.replace("s1: {train.seed: 1}", 's1: {train.start_from: "{runs}/ar_u1_s2"}')
    folder = one_run(tmp_path, text=text)
    config = (folder / "config.yaml").read_text()
    assert "{runs}/ar_u1_s2" in config
    config = config.replace("{runs}", "/elsewhere/runs").replace("device: cpu", "device: cuda")
    (folder / "config.yaml").write_text(config)
    assert gathered(tmp_path)[1] == []


def test_a_study_that_is_wrong_now_is_still_gathered(tmp_path: Path) -> None:
    one_run(tmp_path)
    text = (tmp_path / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace("{train.seed: 2}", "{train.seed: two}"))
    results, (warning,) = gathered(tmp_path)
    assert len(results.rows) == 2
    assert warning.startswith("the runs are not compared with the study, which is wrong: run ar_u1")


def test_a_metric_does_not_hide_an_axis(tmp_path: Path) -> None:
    one_run(tmp_path, text=LINES.replace(" seed:", " grad_norm:"))
    results, _ = gathered(tmp_path)
    assert results.rows[0]["grad_norm"] == "s1"
    assert results.rows[0]["reported_grad_norm"] == 1.0


def test_a_fact_does_not_hide_an_axis(tmp_path: Path) -> None:
    one_run(tmp_path, text=LINES.replace(" seed:", " host:"))
    assert gathered(tmp_path)[0].rows[0]["host"] == "s1"


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = one_run(tmp_path)
    (folder / "run.json").write_text("{")
    (folder / "config.yaml").write_text("model: {num_layers: [\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": "3", "split": "valid"}\nno json "valid"\n{"step":4,"split":"val')
    results, warnings = gathered(tmp_path)
    assert len(results.rows) == 2
    assert warnings == [
        "masked_u2_s1: 2 lines of metrics.jsonl are no reports and were left out",
        "masked_u2_s1: cannot read run.json; its columns are empty",
        "masked_u2_s1: cannot read config.yaml; its columns are empty",
    ]
    assert results.rows[1]["num_parameters"] is None
    assert results.columns == tuple(COLUMNS)


def test_configurations_of_another_version(tmp_path: Path) -> None:
    folder = one_run(tmp_path)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("num_layers:", "number_of_layers:"))
    results, (warning,) = gathered(tmp_path)
    assert warning.startswith("masked_u2_s1: its config.yaml is of another version")
    assert "number_of_layers" in warning
    assert results.rows[0]["flops_per_token_six_n"] is None
    assert results.rows[0]["data.unique_tokens"] == 3200


def test_what_no_column_can_hold_is_left_empty(tmp_path: Path) -> None:
    folder = one_run(tmp_path)
    lines = [
        {"step": 3, "split": "valid", "nelbo": "high", "tokens": 1.5, "loss": 2},
        {"step": 4, "split": "valid", "nelbo": True, "tokens": 10**30, "loss": 10**30},
        {"step": 5, "split": "valid", "nelbo": 1.5, "tokens": 320.0, "loss": 2**60},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    found = [(row["nelbo"], row["tokens"], row["loss"]) for row in gathered(tmp_path)[0].rows[-3:]]
    assert found == [(None, None, 2.0), (None, None, 1e30), (1.5, 320, 2.0**60)]


def test_a_fact_that_no_column_can_hold_is_left_empty(tmp_path: Path) -> None:
    folder = one_run(tmp_path)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "num_parameters": 10**30, "commit": 7}))
    row = gathered(tmp_path)[0].rows[0]
    assert (row["num_parameters"], row["commit"], row["unique_tokens"]) == (None, None, 3200)
