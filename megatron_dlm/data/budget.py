"""How many unique tokens each dataset of a blend gives."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.data.blend import Blend


def split_budget(unique_tokens: int, weights: Sequence[float]) -> list[int]:
    """Integer parts that sum to the budget, each within about 1 of its share by weight.

    Parts never shrink when the budget grows (rounding by largest remainder does not promise that),
    so the tokens of a smaller budget are a subset of those of a larger one in every dataset.
    """
    counts = Blend.of(weights).counts(unique_tokens)
    return [counts[place] for place in range(len(weights))]
