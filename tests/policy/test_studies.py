"""Every study under examples/studies parses, and each of its runs could start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sources import ROOT
from tiny_corpus import TinyCorpus

from megatron_dlm.scaling.study import read_study

STUDIES = [
    path for path in sorted((ROOT / "examples/studies").glob("*.yaml")) if "_base" not in path.stem
]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_its_runs_could_start(
    path: Path, tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_corpus.tokenizer, tmp_path / "quickstart" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    study = read_study(path)
    study.check()
    assert study.name == path.stem
    assert study.question.endswith("?")
    assert len({run.name for run in study.runs}) == len(study.runs)


def test_the_toy_budgets_are_three_by_two_by_three() -> None:
    study = read_study(ROOT / "examples/studies/toy_unique_budgets.yaml")
    assert study.axes == ("objective", "unique", "seed")
    assert len(study.runs) == 18
