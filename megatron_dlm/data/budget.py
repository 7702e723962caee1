"""How many unique tokens each dataset gives, and their windows, which score each one once.

Legend: N tokens of the stream, S sequence length, w window number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.data.blend import Blend


def split_budget(unique_tokens: int, weights: Sequence[float]) -> list[int]:
    """Integer parts that sum to the budget, each within about 1 of its share by weight.

    Parts never shrink when the budget grows (rounding by largest remainder does not promise that),
    so the tokens of a smaller budget are a subset of those of a larger one in every dataset.
    """
    counts = Blend.of(weights).counts(unique_tokens)
    return [counts[place] for place in range(len(weights))]


@dataclass(frozen=True)
class Windows:
    """Windows of S tokens plus the next one, at stride S over a stream of N tokens.

    Where S does not divide N the last window is moved back to end with the stream and scores only
    what no earlier window did. One epoch, each window once, then scores
    - every token once among the first S columns (diffusion), and
    - every token but the stream's first once among the last S columns (autoregressive targets).
    """

    num_tokens: int
    seq_length: int

    def __post_init__(self) -> None:
        assert self.num_tokens > self.seq_length > 0, (self.num_tokens, self.seq_length)

    @property
    def num_windows(self) -> int:
        return -(-self.num_tokens // self.seq_length)

    def start(self, window: int) -> int:
        """First token of the window in the stream; it reads up to S + 1 tokens from there."""
        assert 0 <= window < self.num_windows, window
        return min(window * self.seq_length, self.num_tokens - self.seq_length)

    def valid(self, window: int) -> np.ndarray:
        """bool [S+1]: which columns of the window are scored."""
        columns = self.start(window) + np.arange(self.seq_length + 1)
        valid = columns >= window * self.seq_length
        # The token after the last full window is scored in the moved window, with more context:
        # as a target of both, the autoregressive loss would count it twice.
        last_full = window == self.num_windows - 2 and self.num_tokens % self.seq_length != 0
        valid[-1] = columns[-1] < self.num_tokens and not last_full
        return valid
