"""Packing, blends and their reports, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import arguments, assert_same_curves, metrics, run_here
from tiny_corpus import TinyCorpus

SHORT = {"train__steps": 8, "validation__interval_steps": 4}


def test_a_blend_reports_its_tiers(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    weights = {str(tiny_corpus.train): 3.0, str(tiny_corpus.other): 1.0}
    changes = {**SHORT, "data__train": weights, "data__unique_tokens": 1024}
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    # 768 and 256 tokens are 24 and 8 windows of 32; every step draws 6 and 2 of them.
    for step, entry in metrics(run).items():
        assert entry["epoch"] == entry["epoch/text"] == entry["epoch/other"] == step / 4
        seen = min(step / 4, 1)
        assert entry["unique_tokens"] == 1024 * seen
        assert entry["unique_tokens/text"] == 768 * seen
        assert entry["unique_tokens/other"] == 256 * seen
    assert metrics(run, "valid")[8]["epoch/other"] == 2
    facts = json.loads((run / "run.json").read_text())
    assert facts["unique_tokens"] == 1024
    assert [(row["name"], row["samples"], row["epochs"]) for row in facts["data"]] == [
        ("text", 48, 2.0),
        ("other", 16, 2.0),
    ]
    log = (run / "train.log").read_text()
    assert "data text: weight 3, 768 unique of" in log
    assert "data other: weight 1, 256 unique of" in log


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_packed_documents_train_and_resume_bit_for_bit(
    kind: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    changes = {**SHORT, "data__packing": "pack", "objective__kind": kind}
    changes |= {"schedule__kind": "constant"}
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_here([*arguments(tiny_corpus, run, **changes), "--train.steps=4"]) == 0
    assert run_here(arguments(tiny_corpus, run, **changes)) == 0
    assert run_here(arguments(tiny_corpus, whole, **changes)) == 0
    assert_same_curves(whole, run, tolerance=0)
    facts = json.loads((run / "run.json").read_text())
    assert 0.5 < facts["text_share"] < 1
    assert f"data.packing pack: {facts['text_share']:.2%} of the window is text" in (
        (run / "train.log").read_text()
    )


def test_documents_change_what_a_model_sees(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The same windows; with the documents kept apart the first loss is another one."""
    losses = []
    for number, reset in enumerate((None, False, True)):
        run = tmp_path / str(number)
        changes = {"train__steps": 1, "schedule__warmup_steps": 0, "data__valid": {}}
        command = arguments(tiny_corpus, run, **changes, data__reset_attention_mask=reset)
        assert run_here(command) == 0
        losses.append(metrics(run)[1]["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


def test_validation_on_training_text_is_refused(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {str(tiny_corpus.train): 1.0, str(tiny_corpus.other): 1.0}
    valid = {str(tiny_corpus.valid): 1.0, str(tiny_corpus.other): 1.0}
    command = arguments(tiny_corpus, tmp_path / "run", **SHORT, data__train=train)
    command = [*command, f"--data.valid={json.dumps(valid)}"]
    assert run_here(command) == 2
    error = capsys.readouterr().err
    assert f"data.train {tiny_corpus.other} and data.valid {tiny_corpus.other} overlap" in error
    assert "data split" in error
    assert not (tmp_path / "run").exists()


def test_padding_cannot_be_shown_to_attention(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**SHORT, "data__packing": "document", "data__reset_attention_mask": False}
    assert run_here(arguments(tiny_corpus, tmp_path / "run", **changes)) == 2
    assert "data.reset_attention_mask is false, but data.packing document" in (
        capsys.readouterr().err
    )
