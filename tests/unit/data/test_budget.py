"""Windows score every token of the stream exactly once an epoch, for both kinds of model."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.data.budget import Windows


@pytest.mark.parametrize("seq_length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("extra_tokens", range(1, 24))
def test_every_token_is_scored_once(seq_length: int, extra_tokens: int) -> None:
    num_tokens = seq_length + extra_tokens
    windows = Windows(num_tokens, seq_length)
    diffusion, autoregressive = np.zeros(num_tokens + 1), np.zeros(num_tokens + 1)
    for window in range(windows.num_windows):
        columns = windows.start(window) + np.arange(seq_length + 1)
        valid = windows.valid(window)
        assert columns[0] >= 0
        assert columns[-1] <= num_tokens
        assert valid.dtype == bool
        np.add.at(diffusion, columns[:-1][valid[:-1]], 1)
        np.add.at(autoregressive, columns[1:][valid[1:]], 1)
    assert diffusion[:-1].tolist() == [1] * num_tokens
    assert autoregressive[:-1].tolist() == [0] + [1] * (num_tokens - 1)
    # The token after the stream does not exist and is never scored.
    assert diffusion[-1] == autoregressive[-1] == 0


def test_number_of_windows_is_the_ceiling() -> None:
    assert [Windows(n, 4).num_windows for n in (5, 8, 9, 12, 13)] == [2, 2, 3, 3, 4]
