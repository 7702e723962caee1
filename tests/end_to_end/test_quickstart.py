"""The quickstart, shortened: all files, what a second start skips, what stops it early."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Ended, latest, metrics
from quickstart_run import STEPS, run_quickstart, start_quickstart

from megatron_dlm.config.commands import QuickstartConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.hf.load import load_model
from megatron_dlm.launch.quickstart import quickstart

RUNS = ("ar", "masked")
pytestmark = pytest.mark.timeout(600)


def test_everything_is_there(short_quickstart: tuple[Path, Ended]) -> None:
    directory, ended = short_quickstart
    assert ended.code == 0, ended.errors
    root = directory / "quickstart"
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in RUNS:
        assert max(metrics(root / name)) == STEPS
        assert max(metrics(root / name, "valid")) == STEPS
    for part in ("curves.png", "samples.txt", "hf/ar", "scores/masked", "ar.yaml", "Try next"):
        assert part in ended.output
    assert not list(root.rglob("*.tmp"))


@pytest.mark.parametrize("name", RUNS)
def test_the_exports_are_the_checkpoints_in_transformers(
    name: str, short_quickstart: tuple[Path, Ended]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the extra [hf]")
    root = short_quickstart[0] / "quickstart"
    directory, is_ours = root / "hf" / name, name == "masked"
    parity = json.loads((directory / "parity.json").read_text())
    assert parity["maximum_difference"] <= 1e-5
    assert parity["largest_logit"] > 0.01
    # Without trust_remote_code the stock class, or nothing.
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=is_ours
    )
    assert type(loaded).__name__ == ("MegatronDLMForCausalLM" if is_ours else "Qwen3ForCausalLM")
    trained = load_model(root / name, tokenizer=root / "tokenizer")
    assert trained.tokenizer is not None
    text = 'def read(path):\n    """The text of a file."""\n'
    tokens = torch.tensor([trained.tokenizer.encode(text)])
    theirs: Any = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=is_ours)
    assert theirs(text)["input_ids"] == tokens[0].tolist()
    difference = (loaded(tokens).logits - trained.model(tokens).logits).abs().max()
    assert float(difference.detach()) <= 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_both_models_have_scores(name: str, short_quickstart: tuple[Path, Ended]) -> None:
    directory = short_quickstart[0] / "quickstart" / "scores" / name
    report = json.loads((directory / "tasks.json").read_text())
    assert report["objective"] == {"ar": "autoregressive", "masked": "masked"}[name]
    assert 0 <= report["results"]["next_line"]["acc,none"] <= 1
    # After 6 steps a token still costs about the logarithm of the vocabulary of 512.
    assert 2 < report["results"]["library_text"]["bits_per_byte,none"] < 9
    assert report["delta_nll"]["next_line"]["num_questions"] == 50
    lines = (directory / "samples_next_line.jsonl").read_text().splitlines()
    answers = [json.loads(line)["filtered_resps"] for line in lines]
    assert [len(answer) for answer in answers] == [4] * 50
    assert all(float(log_prob) < 0 for answer in answers for log_prob, _ in answer)


def test_both_models_have_written(short_quickstart: tuple[Path, Ended]) -> None:
    directory, ended = short_quickstart
    text = (directory / "quickstart" / "samples.txt").read_text()
    assert text in ended.output
    _, ar, masked = re.split(r"^=== ", text, flags=re.MULTILINE)
    assert ar.startswith("autoregressive (exact NLL): Qwen3ForCausalLM, class of transformers")
    assert masked.startswith("masked diffusion (upper bound): MegatronDLMForCausalLM, code of the")
    for part in (ar, masked):
        _, *samples = re.split(r"^--- prompt ", part, flags=re.MULTILINE)
        assert len(samples) == 4
        for sample in samples:
            prompt, _, written = sample.partition("\n")
            begun = ast.literal_eval(prompt)
            assert written.startswith(begun)
            assert len(written.strip()) > len(begun) + 10


def test_both_runs_differ_in_the_objective_only(short_quickstart: tuple[Path, Ended]) -> None:
    root = short_quickstart[0] / "quickstart"
    ar, masked = (
        parse(RunConfig, ["--config", str(root / f"{name}.yaml")], "test")
        for name in ("ar", "masked")
    )
    assert (ar.objective.kind, masked.objective.kind) == ("autoregressive", "masked")
    for section in ("model", "data", "optimizer", "schedule", "parallel", "validation"):
        assert getattr(ar, section) == getattr(masked, section)


def test_text_that_is_held_out_is_not_trained_on(short_quickstart: tuple[Path, Ended]) -> None:
    corpus = short_quickstart[0] / "quickstart" / "corpus"
    train, valid = (
        set((corpus / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "valid")
    )
    assert len(train) > len(valid) > 100
    assert not train & valid


def test_a_second_start_repeats_nothing(short_quickstart: tuple[Path, Ended]) -> None:
    directory, first = short_quickstart
    root = directory / "quickstart"
    kept = [path for path in root.rglob("*") if path.is_file() and path.name != "curves.png"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    second = run_quickstart(directory)
    assert second.code == 0, second.errors
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert first.output.count("\n$ ") == 9
    assert second.output.count("\n$ ") == 0


def test_a_stop_signal_saves_and_ends_without_a_traceback(
    short_quickstart: tuple[Path, Ended], tmp_path: Path
) -> None:
    root = tmp_path / "quickstart"
    for part in ("corpus", "tokenizer", "data"):
        shutil.copytree(short_quickstart[0] / "quickstart" / part, root / part)
    job = start_quickstart(tmp_path, steps=100_000)
    job.wait_for(lambda: (root / "ar" / "metrics.jsonl").exists() and bool(metrics(root / "ar")))
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.code == 128 + signal.SIGTERM
    assert "Traceback" not in ended.errors
    assert "the same command goes on from here" in ended.output
    assert latest(root / "ar") >= 10
    assert not (root / "masked").exists()


def test_a_failing_step_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "quickstart" / "tokenizer").mkdir(parents=True)
    (tmp_path / "quickstart" / "tokenizer" / "thesis.txt").write_text("do not touch")
    ended = run_quickstart(tmp_path)
    assert ended.code == 2
    said = ended.error_lines()
    assert "thesis.txt" in said[0]
    assert said[1].startswith("megatron-dlm quickstart: error: `megatron-dlm ... tokenizer` ended")


def test_ranks_that_cannot_share_the_batch(tmp_path: Path) -> None:
    config = QuickstartConfig(output_dir=str(tmp_path / "quickstart"), num_ranks=3)
    with pytest.raises(ValueError, match="num_ranks is 3"):
        quickstart(config)
    assert not (tmp_path / "quickstart").exists()
