"""Runs that several tests look at: one on a single rank, never interrupted, and the quickstart."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import Ended, arguments, run_here
from filelock import FileLock
from quickstart_run import run_quickstart
from tiny_corpus import TinyCorpus


@pytest.fixture(scope="session")
def whole_run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the tiny run on one rank, never interrupted."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(arguments(tiny_corpus, output_dir, checkpoint__interval_steps=12)) == 0
    return output_dir


@pytest.fixture(scope="session")
def short_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Ended]]:
    """The directory it ran in, and how it ended. To be left as it is.

    It takes a minute: pytest's workers share one.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "short_quickstart"
    end = shared / "short_quickstart.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(directory / "hf_home"))  # not the user's caches
        with FileLock(shared / "short_quickstart.lock"):
            if not end.exists():
                directory.mkdir()
                end.write_text(json.dumps(asdict(run_quickstart(directory))))
        yield directory, Ended(**json.loads(end.read_text()))
