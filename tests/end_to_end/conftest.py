"""The uninterrupted single-rank run that interrupted runs are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import arguments, run_here
from tiny_corpus import TinyCorpus


@pytest.fixture(scope="session")
def whole_run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the tiny run on one rank, never interrupted."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(arguments(tiny_corpus, output_dir, checkpoint__interval_steps=12)) == 0
    return output_dir
