"""The `generate` command, in this process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.generation_commands import GenerateConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.generation.generate import generate, sampling_of

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> None:
    generate(parse(GenerateConfig, [str(argument) for argument in arguments], "generate"))


def test_prompts_of_all_sources_in_order(models, tmp_path, monkeypatch):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "from a file", "id": 1}\n\n{"prompt": ""}\n')
    output = tmp_path / "texts.jsonl"
    arguments = ["--model", models["masked"], "--num_tokens", 8, "--output", output]
    run(*arguments, "--prompt", "one", "two", "--prompts_file", lines)
    texts = [json.loads(line) for line in output.read_text().splitlines()]
    assert [text["prompt"] for text in texts] == ["one", "two", "from a file", ""]
    for text in texts:
        assert text["model"] == str(models["masked"])
        assert {"text", "tokens", "seconds", "tokens_per_second", "num_evaluations", "seed"} <= {
            *text
        }
    plain = tmp_path / "prompts.txt"
    plain.write_text("a line\r\n\n  indented\n")
    run(*arguments, "--prompts_file", plain)
    texts = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert texts == ["a line", "  indented"]
    for source in ([], ["--prompts_file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("piped\nin\n"))
        run(*arguments, *source)
        texts = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
        assert texts == ["piped", "in"]


def test_json_lines_or_texts_on_standard_output(models, capsys):
    arguments = ["--model", models["ar"], "--num_tokens", 6, "--prompt", "def ", "--seed", 3]
    run(*arguments, "--output", "-", "--num_samples", 2)
    lines = capsys.readouterr().out.splitlines()
    texts = [json.loads(line) for line in lines]
    assert [text["sample"] for text in texts] == [0, 1]
    assert {text["seed"] for text in texts} == {3}
    run(*arguments)
    output = capsys.readouterr().out
    assert "def " in output
    assert "6 tokens, 6 function evaluations" in output


def test_options_reach_the_sampler(models, capsys):
    flags = ["--model", models["masked"], "--prompt", "def ", "--num_tokens", 16, "--output", "-"]

    def evaluations(*more):
        run(*flags, *more)
        return json.loads(capsys.readouterr().out)["num_evaluations"]

    assert evaluations() == 16
    assert evaluations("--order", "low_confidence", "--num_steps", 4) == 4
    assert evaluations("--order", "random", "--num_steps", 4, "--guidance", 0.5) == 8
    assert evaluations("--threshold", 0.0, "--block_size", 4, "--cache", "dual") == 4
    assert 1 <= evaluations("--num_steps", 3) <= 3


def test_options_of_hybrid_and_block_models_reach_their_samplers(models, capsys):
    def evaluations(kind, *more):
        flags = ["--model", models[kind], "--prompt", "def ", "--num_tokens", 12, "--output", "-"]
        run(*flags, *more)
        return json.loads(capsys.readouterr().out)["num_evaluations"]

    assert evaluations("hybrid") == 128
    assert evaluations("hybrid", "--num_steps", 5, "--schedule", "linear", "--prior", "mask") == 5
    assert evaluations("hybrid", "--method", "adaptive", "--tokens_per_step", 3) <= 5
    more = evaluations("hybrid", "--num_steps", 5, "--correction_steps", 4)
    assert 6 <= more <= 9
    assert evaluations("block") == 12
    assert evaluations("block", "--order", "low_confidence", "--num_steps", 6) in (6, 7)
    assert evaluations("block", "--cache", "none", "--threshold", 0.0) in (3, 4)


def test_defaults_of_the_order():
    def order(**options):
        return sampling_of(GenerateConfig(model="m", **options)).decoding.order

    assert order() == "first_hitting"
    assert order(num_steps=4) == "ancestral"
    assert order(threshold=0.9) == "low_confidence"
    assert order(num_steps=4, order="entropy") == "entropy"


def test_models_side_by_side(models, capsys, tmp_path):
    output = tmp_path / "texts.jsonl"
    flags = ["--prompt", "def ", "import ", "--num_tokens", 5, "--threshold", 0.9]
    run("--compare", models["ar"], models["masked"], *flags, "--output", output)
    shown = capsys.readouterr().out
    assert shown.count("function evaluations") >= 2
    texts = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(text["model"], text["prompt"]) for text in texts] == [
        (str(models[kind]), prompt) for kind in ("ar", "masked") for prompt in ("def ", "import ")
    ]
    everyone = [models[kind] for kind in ("ar", "masked", "block", "hybrid")]
    options = ["--guidance", 0.5, "--method", "adaptive", "--cache", "prompt"]
    run("--compare", *everyone, *flags, *options, "--output", "-")
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_bad_input_is_named(models, tmp_path, monkeypatch):
    ar, masked = models["ar"], models["masked"]
    prompt = ["--prompt", "def "]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "good"}\n{"text": "no"}\n')
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    cases = [
        (prompt, "exactly one of model"),
        (["--model", ar, "--compare", ar, masked, *prompt], "exactly one of model"),
        (["--compare", ar, *prompt], "compare has one model"),
        (["--model", ar], "there is no prompt"),
        (["--model", ar, *prompt, "--num_tokens", 0], "num_tokens is 0"),
        (
            ["--model", ar, *prompt, "--order", "random"],
            "order is random, which is for masked and block models; .* is autoregressive: remove",
        ),
        (
            ["--model", models["block"], *prompt, "--guidance", 1],
            "guidance is 1.0, which is for masked models; .* is block",
        ),
        (["--model", models["block"], *prompt, "--block_size", 4], "block_size is 4, which is"),
        (["--model", models["hybrid"], *prompt, "--order", "entropy"], "is hybrid: remove order"),
        (["--model", masked, *prompt, "--patience", 4], "belong to method adaptive"),
        (
            ["--model", masked, *prompt, "--method", "adaptive"],
            "method is adaptive, which is for hybrid models; .* is masked",
        ),
        (
            ["--model", models["hybrid"], *prompt, "--correction_patience", 4],
            "no meaning without correction_steps",
        ),
        (
            ["--model", ar, *prompt, "--cache", "dual", "--block_size", 4],
            "block_size is 4, which is",
        ),
        (["--model", ar, *prompt, "--guidance", 1], "guidance is 1.0, which is for masked models"),
        (["--model", ar, *prompt, "--live", "true"], "live needs a terminal"),
        (["--model", ar, *prompt, "--live", "true", "--output", "-"], "live draws on standard"),
        (["--model", ar, *prompt, "--live_pause_seconds", 1], "no meaning without live"),
        (["--model", ar, "--prompts_file", binary], "binary.txt is not a text file in UTF-8"),
        (["--model", ar, *prompt, "--seed", -1], "seed is -1"),
        (["--model", ar, "--prompts_file", broken], "broken.jsonl, line 2: expected a JSON object"),
        (
            ["--model", masked, *prompt, "--num_steps=9", "--block_size=4", "--num_tokens=16"],
            "9 for 4 blocks of 4 tokens; give a multiple of 4",
        ),
        (["--model", ar, *prompt, "--temperature", -1], "temperature is -1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    for missing in (
        ["--model", tmp_path / "nowhere", *prompt],
        ["--model", ar, "--prompts_file", "no.txt"],
    ):
        with pytest.raises((ValueError, OSError), match=r"nowhere|no\.txt"):
            run(*missing)
    with pytest.raises(OSError, match="missing"):
        run("--model", ar, *prompt, "--output", tmp_path / "missing" / "texts.jsonl")


def command(arguments: list[object], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_dlm", "generate", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def test_the_command_in_a_pipe(models, tmp_path):
    arguments = ["--model", models["masked"], "--num_tokens", 60, "--output", "-"]
    answer = command([*arguments, "--temperature", 0], "x\ny\n")
    assert answer.returncode == 0, answer.stderr
    texts = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [text["prompt"] for text in texts] == ["x", "y"]
    refused = command(arguments, "x\n" + "long " * 40)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("megatron-dlm generate: error: prompt 2 ('long long")
    assert refused.stdout == ""
