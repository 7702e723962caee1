"""Models whose likelihoods are known exactly: conditionals of a table over all texts, and a hash.

Ids 0..NUM_IDS-1 are text, MASK is the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dlm.evaluation.reading import SlotReader

NUM_IDS, MASK = 3, 3

Function = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [b, s], real bool [b, s]) -> logits float64 [b, s, V]."""


class Counted:
    """A reader that keeps the shapes of its calls."""

    def __init__(self, function: Function, silent_ids: tuple[int, ...] = ()) -> None:
        self.shapes: list[tuple[int, ...]] = []

        def logits(tokens: Tensor, valid: Tensor | None) -> Tensor:
            self.shapes.append(tuple(tokens.shape))
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            return function(tokens, real)

        self.reader = SlotReader(logits, lambda rows: rows, silent_ids=silent_ids)


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
