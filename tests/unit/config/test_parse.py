"""Merge order, strictness and messages of the configuration parser."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from megatron_dlm.config.commands import PlanRunConfig, PreprocessConfig, TokenizerConfig
from megatron_dlm.config.keys import leaf_types
from megatron_dlm.config.parse import dump, parse, preset_names
from megatron_dlm.config.schema import RunConfig


def parse_run(*argv: str) -> RunConfig:
    return parse(RunConfig, argv, prog="megatron-dlm train")


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_defaults() -> None:
    assert parse_run() == RunConfig()


def test_defaults_then_files_in_order_then_flags(tmp_path: Path) -> None:
    first = write(
        tmp_path, "a.yaml", "model: {num_layers: 2, hidden_size: 64}\ntrain: {steps: 5}\n"
    )
    second = write(tmp_path, "b.yaml", "model: {hidden_size: 32}\n")
    # The flag stands before the files and still wins.
    config = parse_run("--train.steps", "9", "--config", first, f"--config={second}")
    assert (config.model.num_layers, config.model.hidden_size, config.train.steps) == (2, 32, 9)
    assert config.model.num_attention_heads == RunConfig().model.num_attention_heads


def test_later_mapping_replaces_the_earlier_one(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "data: {train: {a/b.c: 1, d: 2}, seed: 7}\n")
    second = write(tmp_path, "b.yaml", "data: {train: {e: 0.5}}\n")
    assert parse_run("--config", first).data.train == {"a/b.c": 1.0, "d": 2.0}
    merged = parse_run("--config", first, "--config", second).data
    assert (merged.train, merged.seed) == ({"e": 0.5}, 7)


@pytest.mark.parametrize("text", ['{"x.y/z": 1, "w": 2.5}', "{x.y/z: 1, w: 2.5}"])
def test_mapping_on_the_command_line(text: str) -> None:
    assert parse_run("--data.train", text).data.train == {"x.y/z": 1.0, "w": 2.5}


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-3 as text.
    path = write(tmp_path, "a.yaml", "optimizer: {lr: 1e-3}\n")
    assert parse_run("--config", path).optimizer.lr == 1e-3
    assert parse_run("--optimizer.lr", "1e-3").optimizer.lr == 1e-3


def test_null_takes_an_optional_value_back(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "train: {steps: 5}\n")
    config = parse_run("--config", path, "--train.steps", "null", "--train.epochs", "9.6")
    assert (config.train.steps, config.train.epochs) == (None, 9.6)


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse_run("--config", write(tmp_path, "empty.yaml", "# nothing\n")) == RunConfig()


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_presets_serve_every_objective_and_survive_a_dump(
    preset: str, kind: str, tmp_path: Path
) -> None:
    config = parse_run("--config", f"preset:{preset}", "--objective.kind", kind)
    assert config.objective.kind == kind
    assert parse_run("--config", write(tmp_path, "dump.yaml", dump(config))) == config


def test_round_trip_of_unusual_values(tmp_path: Path) -> None:
    config = parse_run(
        "--data.train", '{"a b/c:d": 1e-7, "été": 3}',
        "--optimizer.lr", "1.0000000000000002e-05",
        "--model.megatron", '{"flag": true, "ratio": 1e-3, "count": 2, "name": "x", "none": null}',
        "--train.output_dir", "runs/12",
    )  # fmt: skip
    assert config.model.megatron == {
        "flag": True, "ratio": 1e-3, "count": 2, "name": "x", "none": None,
    }  # fmt: skip
    assert parse_run("--config", write(tmp_path, "dump.yaml", dump(config))) == config


ERRORS = {
    "unknown_key": (
        "model: {num_layer: 2}",
        [],
        r"--config .*bad\.yaml: unknown key model\.num_layer; did you mean model\.num_layers\?$",
    ),
    "right_key_in_the_wrong_section": (
        "train: {lr: 1.0}",
        [],
        r"unknown key train\.lr; did you mean optimizer\.lr\?$",
    ),
    "unknown_section": ("modle: {num_layers: 2}", [], r"bad\.yaml: unknown key modle"),
    "wrong_type": (
        "model: {num_layers: two}",
        [],
        r"--config .*bad\.yaml: model\.num_layers is two; expected an integer$",
    ),
    "fraction_for_an_integer": ("model: {num_layers: 2.5}", [], r"is 2\.5; expected an integer$"),
    "wrong_choice": (
        "objective: {kind: mask}",
        [],
        r"objective\.kind is mask; expected one of autoregressive, masked, hybrid, block$",
    ),
    "wrong_mapping": ("data: {train: 3}", [], r"data\.train is 3; expected a mapping of text to a"),
    "null_number": (
        "validation: {interval_steps: null}",
        [],
        r"bad\.yaml: validation\.interval_steps is null; expected an integer$",
    ),
    "null_mapping": ("data: {train:}", [], r"data\.train is null; expected a mapping of text"),
    "section_is_a_value": ("model: 3", [], r"section model is 3; give it keys or remove it$"),
    "section_is_empty": ("model:", [], r"section model is empty; give it keys or remove it$"),
    "given_twice": ("train: {steps: 1}\ntrain: {steps: 2}", [], r"line 2: train is given twice$"),
    "broken_yaml": ("model: {a: [", [], r"bad\.yaml: not valid YAML: .*line \d+"),
    "very_deep": ("model: " + "[" * 5000, [], r"bad\.yaml: nested too deeply to be a conf"),
    "not_a_mapping": ("- a", [], r"expected sections such as `model:`"),
    "own_check": (
        "model: {hidden_size: 7}",
        [],
        r"model\.hidden_size 7 is not a multiple of model\.num_attention_heads 4$",
    ),
    "unknown_flag": (
        "",
        ["--model.num_layer", "3"],
        r"^unknown flag --model\.num_layer; did you mean --model\.num_layers\?$",
    ),
    "short_flag": ("", ["--seq_length=4"], r"did you mean --model\.seq_length\?$"),
    "wrong_flag_type": ("", ["--optimizer.lr=x"], r"^--optimizer\.lr is x; expected a number$"),
    "flag_over_good_file": (
        "model: {num_layers: 2}",
        ["--model.num_layers", "x"],
        r"^--model\.num_layers is x; expected an integer$",
    ),
    "flag_without_value": ("", ["--model.num_layers"], r"--model\.num_layers"),
    "stray_word": ("", ["stray"], r"stray"),
    "unknown_preset": (
        "",
        ["--config", "preset:sdl_1"],
        r"preset:sdl_1: no such preset; did you mean sdl_1b\? \(have: .*tiny\)$",
    ),
    "missing_file": ("", ["--config", "none.yaml"], r"none\.yaml: cannot read the file \(No such"),
    "config_without_name": ("", ["--config"], r"--config needs a file name"),
}


@pytest.mark.parametrize(("text", "flags", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_one_line_with_its_remedy(
    text: str, flags: list[str], message: str, tmp_path: Path
) -> None:
    files = ["--config", write(tmp_path, "bad.yaml", text)] if text else []
    with pytest.raises(ValueError, match=message) as caught:
        parse_run(*files, *flags)
    assert "\n" not in str(caught.value)


def test_fields_of_another_objective_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"objective\.weighting has no meaning for objective\.kind"
    ):
        parse_run("--objective.kind", "autoregressive", "--objective.weighting", "count")


def field_docstrings(config_class: type) -> list[str]:
    """First words of every attribute docstring, straight from the source."""
    import ast
    import inspect

    hints = get_type_hints(config_class)
    found = []
    for item in fields(config_class):
        kind: Any = hints[item.name]
        if is_dataclass(kind):
            found += field_docstrings(kind)  # type: ignore[arg-type]
    body = ast.parse(inspect.getsource(config_class)).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(following.value, ast.Constant)
            found.append(str(following.value.value))
    return found


@pytest.mark.parametrize("config_class", [RunConfig, TokenizerConfig, PreprocessConfig])
def test_help_shows_every_field_with_its_docstring(
    config_class: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        parse(config_class, ["--help"], prog="x")
    text = " ".join(capsys.readouterr().out.split())
    docstrings = field_docstrings(config_class)
    leaves = leaf_types(config_class)
    assert len(docstrings) == len(leaves) > 0  # every field has one
    assert [key for key in leaves if f"--{key}" not in text] == []
    assert [words for words in docstrings if " ".join(words.split()) not in text] == []


def test_lists_take_several_words_and_repeats() -> None:
    argv = ["--input", "a", "b", "--output_dir", "d", "--input=c"]
    assert parse(TokenizerConfig, argv, prog="x").input == ["a", "b", "c"]
    argv = ["--input", '["a b", "c"]', "--output_dir", "d"]
    assert parse(TokenizerConfig, argv, prog="x").input == ["a b", "c"]


def test_dashes_are_underscores_in_flags_and_nowhere_else() -> None:
    config = parse_run("--train.global-batch-size", "64", "--optimizer.adam-beta2=0.9")
    assert (config.train.global_batch_size, config.optimizer.adam_beta2) == (64, 0.9)
    argv = ["--input", "a-b", "--output-dir", "d-e", "--input=c-d"]
    found = parse(TokenizerConfig, argv, prog="x")
    assert (found.input, found.output_dir) == (["a-b", "c-d"], "d-e")
    assert parse_run("--data.train", "{x-y/z: 1}").data.train == {"x-y/z": 1.0}
    with pytest.raises(ValueError, match=r"unknown flag --train\.global-batch-sizes; did"):
        parse_run("--train.global-batch-sizes", "64")


def test_powers_of_ten_are_integers_where_these_are_expected(tmp_path: Path) -> None:
    config = parse_run(
        "--data.unique_tokens", "1e9", "--train.steps=2.5e3", "--optimizer.lr", "1e1"
    )
    assert (config.data.unique_tokens, config.train.steps) == (10**9, 2500)
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (10.0, float)
    with pytest.raises(ValueError, match=r"^--train\.steps is 1\.5e0; expected an integer or null"):
        parse_run("--train.steps", "1.5e0")
    path = write(tmp_path, "1e3", "train: {steps: 7}\n")
    assert parse_run("--train.output_dir", "1e3", "--config", path).train.output_dir == "1e3"


def test_missing_required_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"^output_dir is missing; give it as a --flag"):
        parse(TokenizerConfig, ["--input", "a"], prog="x")


def test_plan_reads_a_run_file_and_its_own_flags(tmp_path: Path) -> None:
    run = parse_run("--config", "preset:tiny")
    path = write(tmp_path, "run.yaml", dump(run))
    argv = ["--config", path, "--model.num_layers", "8", "--plan.num_gpus", "64"]
    plan = parse(PlanRunConfig, argv, prog="x")
    assert (plan.model.num_layers, plan.plan.num_gpus, plan.train) == (8, 64, run.train)
