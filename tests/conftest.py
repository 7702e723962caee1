"""Real ranks on gloo for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool

from megatron_dlm.runtime.device import open_device

open_device("auto")  # before any test module imports megatron.core


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four worker processes that live for the whole session: importing Megatron takes seconds."""
    with RankPool(size=4) as pool:
        yield pool
