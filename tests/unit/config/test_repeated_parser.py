"""Many command lines of one configuration: what `parse` makes of each, only faster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_dlm.config.parse import RepeatedParser, keys_of_file, parse
from megatron_dlm.config.schema import RunConfig

GIDD = Path(__file__).parents[3] / "examples/configs/gidd"
FILES = [
    word
    for part in ("base", "model_85m", "noise_uniform", "recipe_published")
    for word in ("--config", str(GIDD / f"{part}.yaml"))
]
LINES = {
    "nothing": [],
    "files": FILES,
    "flags win": [*FILES, "--optimizer.lr", "1e-3", "--model.moe.num_experts", "4"],
    "joined flag": ["--optimizer.lr=0.5", "--config", "preset:sdl_1b", "--train.epochs", "9.6"],
    "null": [*FILES, "--train.steps", "null", "--train.epochs", "3"],
    "mappings": [
        "--data.train",
        '{"a b": 1, "c": 0.5}',
        "--optimizer.adam_beta2_by_batch",
        "{8: 0}",
    ],
    "key of a mapping": [*FILES, "--data.train.other", "2.0"],
    "whole section": ["--model.moe", '{"num_experts": 4, "ffn_hidden_size": 8}'],
    "later flag": ["--optimizer.lr", "1", "--optimizer.lr", "2"],
    "list": ["--model.moe.count_scales", "[]"],
}
WRONG = {
    "unknown flag": ["--optimizer.rate", "1"],
    "type": [*FILES, "--optimizer.lr", "fast"],
    "value": [*FILES, "--optimizer.lr", "-1"],
    "no file": ["--config", "nowhere.yaml"],
    "no preset": ["--config", "preset:sdl_2b"],
    "sections": ["--objective.kind", "autoregressive", "--objective.prompt_share", "0.5"],
}


@pytest.fixture(scope="module")
def parser() -> RepeatedParser[RunConfig]:
    return RepeatedParser(RunConfig, "test")


@pytest.mark.parametrize("line", LINES)
def test_as_parse(parser: RepeatedParser[RunConfig], line: str) -> None:
    wanted = parse(RunConfig, LINES[line], "test")
    assert parser.parse(LINES[line]) == wanted
    assert parser.parse(LINES[line]) == wanted, "again"


@pytest.mark.parametrize("line", WRONG)
def test_refuses_as_parse(parser: RepeatedParser[RunConfig], line: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as wanted:
        parse(RunConfig, WRONG[line], "test")
    with pytest.raises(ValueError, match=r"\w") as caught:
        parser.parse(WRONG[line])
    assert str(caught.value) == str(wanted.value)


def test_half_a_thousand_lines_take_seconds(parser: RepeatedParser[RunConfig]) -> None:
    started = time.process_time()
    rates = [parser.parse([*FILES, "--optimizer.lr", str(n)]).optimizer.lr for n in range(1, 511)]
    assert time.process_time() - started < 15  # `parse` takes minutes
    assert rates == [float(n) for n in range(1, 511)]


def test_keys_of_a_file(tmp_path: Path) -> None:
    assert keys_of_file(RunConfig, str(GIDD / "noise_uniform.yaml")) == ["objective.noise_type"]
    (tmp_path / "wrong.yaml").write_text("model: {layers: 3}")
    with pytest.raises(ValueError, match=r"wrong\.yaml: unknown key model\.layers; did you mean"):
        keys_of_file(RunConfig, str(tmp_path / "wrong.yaml"))
