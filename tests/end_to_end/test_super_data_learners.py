"""The published unique-token budgets, scaled down: the same files, epochs and batch on a CPU.

The tokens are divided, by 100,000 here and by 10,000 under `-m slow`; the budgets, their epochs and
the 256 samples of a step keep the published ratios. Network and sequence are tiny.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import metrics, run_here

from megatron_dlm.config.commands import PreprocessConfig, TokenizerConfig
from megatron_dlm.data.preprocessing.preprocess import preprocess
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs" / "super_data_learners"
SEQ_LENGTH, VOCAB_SIZE, BATCH_SIZE = 64, 384, 256
RUNS = {
    "0b5_192e": (500_000_000, 192),
    "1b_96e": (1_000_000_000, 96),
    "1b5_64e": (1_500_000_000, 64),
    "10b_9e6": (10_000_000_000, 9.6),
    "96b_1e": (96_000_000_000, 1),
}
KINDS = ("ar", "masked")
OVERRIDES: dict[str, Any] = {
    "model.num_layers": 1,
    "model.hidden_size": 8,
    "model.num_attention_heads": 1,
    "model.ffn_hidden_size": 16,
    "model.seq_length": SEQ_LENGTH,
    "model.vocab_size": "null",
    "objective.mask_token_id": "null",
    "optimizer.lr": 1e-2,
    "train.micro_batch_size": 256,
    "train.precision": "fp32",
    "train.device": "cpu",
    "checkpoint.interval_steps": 10_000,
    "checkpoint.asynchronous": "false",
    "validation.num_samples": 256,
    "logging.interval_steps": 5,
    "logging.tensorboard": "false",
}


def python_sources() -> Iterator[Path]:
    """The standard library, and then the installed packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    yield from sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))


def make_corpus(directory: Path, num_tokens: int) -> Path:
    """Python sources of at least this many tokens, and their tokenizer."""
    text, size = directory / "text.jsonl", 0
    with text.open("w") as stream:
        for path in python_sources():
            document = path.read_text(errors="replace")[:20_000]
            stream.write(json.dumps({"text": document}) + "\n")
            size += len(document)
            if size > 2.5 * num_tokens:
                break
    train_tokenizer(
        TokenizerConfig(
            [str(text)],
            output_dir=str(directory / "tokenizer"),
            vocab_size=VOCAB_SIZE,
            max_sentences=20_000,
        )
    )
    preprocess(
        PreprocessConfig(
            [str(text)],
            str(directory / "text"),
            str(directory / "tokenizer"),
            validation_fraction=0.02,
        )
    )
    assert open_dataset(directory / "text").num_tokens >= num_tokens
    return directory


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("small"), 960_000)


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("large"), 9_600_000)


def train(name: str, kind: str, corpus: Path, budget: int, run: Path) -> None:
    settings = {
        **OVERRIDES,
        "data.tokenizer": corpus / "tokenizer",
        "data.train": json.dumps({str(corpus / "text"): 1.0}),
        "data.valid": json.dumps({str(corpus / "text_valid"): 1.0}),
        "data.unique_tokens": budget,
        # As in the published runs: 2000 of 183,106 steps, and a validation for each 1/96 of them.
        "schedule.warmup_steps": max(1, num_steps(name, budget) * 2000 // 183_106),
        "validation.interval_steps": max(20, num_steps(name, budget) // 10),
        "train.output_dir": run,
    }
    files = ["--config", "preset:sdl_1b", "--config", str(CONFIGS / f"{name}_{kind}.yaml")]
    flags = [f"--{key}={value}" for key, value in settings.items()]
    assert run_here(["train", *files, *flags]) == 0


def num_steps(name: str, budget: int) -> int:
    windows = -(-budget // SEQ_LENGTH)
    return -(-round(10 * RUNS[name][1] * windows) // (10 * BATCH_SIZE))


def check_run(name: str, budget: int, run: Path) -> None:
    """Epochs, unique tokens and steps are those of the budget, and the model learns."""
    published_budget, epochs = RUNS[name]
    windows, steps = -(-budget // SEQ_LENGTH), num_steps(name, budget)
    entries = metrics(run)
    assert max(entries) == steps
    for step, entry in entries.items():
        samples = step * BATCH_SIZE
        assert entry["tokens"] == samples * SEQ_LENGTH
        assert entry["epoch"] == pytest.approx(samples / windows, rel=1e-12)
        assert entry["unique_tokens"] == budget * min(samples, windows) // windows
    last = entries[steps]
    assert epochs <= last["epoch"] < epochs + BATCH_SIZE / windows
    assert last["unique_tokens"] == budget
    assert last["tokens"] == pytest.approx(epochs * budget, rel=0.03)
    assert last["lr"] == pytest.approx(0.1 * OVERRIDES["optimizer.lr"], rel=1e-6)
    assert last["nelbo"] < entries[min(entries)]["nelbo"] - 0.5
    valid = metrics(run, "valid")
    assert max(valid) == steps
    (row,) = json.loads((run / "run.json").read_text())["data"]
    assert (row["unique_tokens"], row["seen_tokens"]) == (budget, budget)
    assert row["samples"] == steps * BATCH_SIZE
    assert published_budget * epochs == 96 * 10**9
    assert f"{budget:,} unique of" in (run / "train.log").read_text()


@pytest.mark.parametrize(("name", "kind"), zip(RUNS, ("ar", "masked") * 3, strict=False))
def test_a_hundred_thousandth_trains(
    name: str, kind: str, small_corpus: Path, tmp_path: Path
) -> None:
    budget = RUNS[name][0] // 100_000
    train(name, kind, small_corpus, budget, tmp_path / "run")
    check_run(name, budget, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_a_ten_thousandth_trains(name: str, kind: str, large_corpus: Path, tmp_path: Path) -> None:
    budget = RUNS[name][0] // 10_000
    train(name, kind, large_corpus, budget, tmp_path / "run")
    check_run(name, budget, tmp_path / "run")
