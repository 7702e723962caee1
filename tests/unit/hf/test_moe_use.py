"""Models with experts as evaluate and generate use them: a text does not feel its batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import write_run
from tiny_corpus import TinyCorpus

from megatron_dlm import cli
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.evaluation.estimates import MaskDraws, Request
from megatron_dlm.evaluation.likelihood import score
from megatron_dlm.hf.load import load_model

CHOICE = MoEConfig(num_experts=4, routing="expert_choice", shared_expert_ffn_hidden_size=8)
TOKENS = MoEConfig(num_experts=4, score_function="sigmoid", expert_bias=True)
CASES: dict[str, tuple[Any, MoEConfig, dict[str, Any]]] = {
    "autoregressive": ("autoregressive", TOKENS, {}),
    "masked": ("masked", CHOICE, {}),
    "hybrid": ("hybrid", CHOICE, {}),
    "hybrid_prompts": ("hybrid", CHOICE, {"prompt_share": 0.2}),
    "block": ("block", TOKENS, {"block_size": 4}),
}
REQUESTS = [
    Request((1, 2, 3), (4, 5)),
    Request((7, 8, 9, 10, 11, 12, 13, 14), (15, 16, 17, 18, 19)),
    Request((20,), (21, 22, 23)),
]


@pytest.mark.parametrize("case", CASES)
def test_likelihoods_alone_and_padded_are_equal(case: str, tmp_path: Path) -> None:
    """Requests of other lengths pad the rows; experts must not choose the padding."""
    kind, moe, learned = CASES[case]
    model = load_model(write_run(tmp_path / "run", kind=kind, moe=moe, learned=learned))
    draws = MaskDraws(num_samples=4, enumerate_masks="never")
    together = score(model, REQUESTS, draws=draws, batch_size=32)
    for request, found in zip(REQUESTS, together, strict=True):
        (alone,) = score(model, [request], draws=draws, batch_size=1)
        assert found.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
        assert found.log_prob < -1


@pytest.fixture(scope="module")
def text_run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe_use")
    tokenizer = Path(shutil.copytree(tiny_corpus.tokenizer, directory / "tokenizer"))
    size = load_tokenizer(tokenizer).vocab_size
    return write_run(directory / "run", moe=CHOICE, vocab_size=size, tokenizer=tokenizer)


def generate(run: Path, *flags: str) -> int:
    options = ["--prompt", "def f(", "--num_tokens", "6", "--precision", "fp32"]
    return cli.main(["generate", "--model", str(run), *options, *flags])


def test_generate_says_which_caches_there_are_not(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(text_run) == 0
    capsys.readouterr()
    assert generate(text_run, "--cache", "prefix", "--block_size", "2") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("megatron-dlm generate: error: cache prefix computes a part of a text")


def test_models_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = MoEConfig(num_experts=4, capacity_factor=1.0)
    run = write_run(tmp_path / "run", kind="autoregressive", moe=moe)
    output = str(tmp_path / "out")
    assert cli.main(["export", "--checkpoint", str(run), "--output_dir", output]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("megatron-dlm export: error: model.moe.capacity_factor is 1: which")
