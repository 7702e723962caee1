"""Shared by the whole test session: real ranks on gloo, and a tiny real corpus."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch
from rank_pool import RankPool
from tiny_corpus import TinyCorpus, make_tiny_corpus

from megatron_dlm.runtime.device import open_device

open_device("auto")  # before any test module imports megatron.core

# As `make test` has it: threads fight over the cores, and what is compared bit by bit differs by
# how many of them the load of the machine lets run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_MANY_THREADS = 40
# Workers take files in this order; what they begin last should be short, so that both end together.
_LONG_FIRST = ("end_to_end", "distributed", "slurm")

# A shell that starts the suite in the background has it ignore SIGINT, and all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# transformers copies the code of a model here before it runs it: one folder for the session, not
# the user's. It is a package of this process, so it cannot change from test to test.
_CODE_OF_MODELS = tempfile.TemporaryDirectory(prefix="transformers_modules_")
os.environ["HF_MODULES_CACHE"] = _CODE_OF_MODELS.name


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would begin with the files that have most tests: the quickest ones."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        directory = item.path.parent.name
        return _LONG_FIRST.index(directory) if directory in _LONG_FIRST else len(_LONG_FIRST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Modules and tests stay: no collection needs to look through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _let_old_groups_go() -> Iterator[None]:
    """Models that a test lays out in this process hold process groups, whose threads poll."""
    yield
    if len(os.listdir("/proc/self/task")) > _MANY_THREADS:
        gc.collect()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four worker processes that live for the whole session: importing Megatron takes seconds."""
    with RankPool(size=4) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Tokenizer of 400 tokens and three shards of standard library sources."""
    return make_tiny_corpus(tmp_path_factory.mktemp("corpus"))
