"""Models whose likelihoods are known exactly: conditionals of a table over all texts, and a hash.

Ids 0..NUM_IDS-1 are text, MASK is the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dlm.evaluation.reading import Measure, SlotReader

NUM_IDS, MASK = 3, 3

Function = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [b, s], real bool [b, s]) -> logits float64 [b, s, V]."""


class Counted:
    """A reader that keeps the shapes of its calls."""

    def __init__(
        self,
        function: Function,
        silent_ids: tuple[int, ...] = (),
        *,
        measure: Measure | None = None,
        block_size: int | None = None,
    ) -> None:
        """block_size: the function is asked for every corrupted block behind the clean ones."""
        self.shapes: list[tuple[int, ...]] = []
        self.contexts: list[Tensor | None] = []

        def logits(
            tokens: Tensor,
            valid: Tensor | None,
            context: Tensor | None = None,
            doubled: bool = False,
        ) -> Tensor:
            self.shapes.append(tuple(tokens.shape))
            self.contexts.append(context)
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            assert doubled == (block_size is not None)
            if block_size is None:
                return function(tokens, real)
            corrupted, clean = tokens.chunk(2, dim=1)
            seen = real.chunk(2, dim=1)[0]
            block = (seen.cumsum(1) - 1).clamp(min=0) // block_size
            found = torch.zeros(1)
            for number in range(int(block.max()) + 1):
                text = torch.where(block < number, clean, corrupted)
                part = function(text, seen & (block <= number))
                found = torch.where((block == number)[..., None], part, found)
            return found

        self.reader = SlotReader(logits, lambda rows: rows, silent_ids=silent_ids, measure=measure)


def random_joint(num_slots: int, seed: int = 0) -> Tensor:
    """An uneven law over all texts, in the order of itertools.product, float64."""
    weights = torch.rand(NUM_IDS**num_slots, generator=torch.Generator().manual_seed(seed)).double()
    return weights.square() / weights.square().sum()


def texts(num_slots: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(NUM_IDS), repeat=num_slots)))


def table_model(joint: Tensor, num_slots: int) -> Function:
    """Every slot's exact law given the slots that are no masks."""
    every = texts(num_slots)
    one_hot = torch.nn.functional.one_hot(every, NUM_IDS).double()

    def logits(tokens: Tensor, real: Tensor) -> Tensor:
        assert bool(real.all())
        fits = (tokens[:, None] == every) | (tokens[:, None] == MASK)
        return torch.einsum("bw,wsv->bsv", fits.all(2) * joint, one_hot).log()

    return logits


def hash_model(num_ids: int = 7, *, is_causal: bool = False, scale: float = 3.0) -> Function:
    """Logits that depend on every real token and its position, or on those up to the own slot."""

    def logits(tokens: Tensor, real: Tensor) -> Tensor:
        position = (real.cumsum(1) - 1).clamp(min=0)
        terms = (tokens + 1) * (position * position + 3 * position + 1) * real
        state = terms.cumsum(1) if is_causal else terms.sum(1, keepdim=True)
        ids = torch.arange(num_ids, dtype=torch.float64)
        return scale * torch.sin(
            (state + 7 * position)[..., None] + 3 * ids * (position + 1)[..., None]
        )

    return logits
