"""Shared by the whole test session: real ranks on gloo, and a tiny real corpus."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool
from tiny_corpus import TinyCorpus, make_tiny_corpus

from megatron_dlm.runtime.device import open_device

open_device("auto")  # before any test module imports megatron.core


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four worker processes that live for the whole session: importing Megatron takes seconds."""
    with RankPool(size=4) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Tokenizer of 400 tokens and three shards of standard library sources."""
    return make_tiny_corpus(tmp_path_factory.mktemp("corpus"))
