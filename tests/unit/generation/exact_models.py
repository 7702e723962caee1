"""Denoisers that are known exactly: tables over enumerated texts, and hashes of what they may see.

A function maps (tokens int64 [b, s], real bool [b, s]) to logits [b, s, V].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from scipy import stats
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]
NUM_IDS, MASK = 3, 3  # text ids 0..2; a table gives the mask the highest logit, as a trap


@dataclass
class _Stored:
    tokens: Tensor
    real: Tensor


@dataclass
class Toy:
    """A denoiser. Its cache holds tokens, so what a step reuses is as good as computed again."""

    function: Function
    calls: list[Tensor] = field(default_factory=list)
    """Tokens of every call."""
    slots: list[list[int]] = field(default_factory=list)
    """Slots of every call."""
    contexts: list[Tensor | None] = field(default_factory=list)
    """What every call says of who sees only what is given."""

    def __call__(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        slots: Tensor | None = None,
        cache: _Stored | None = None,
        wanted: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        self.calls.append(tokens.clone())
        self.contexts.append(context)
        if cache is None:
            assert slots is None
            self.slots.append(list(range(tokens.shape[1])))
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            logits = self.function(tokens, real)
        else:
            self.slots.append(slots.tolist())
            slots = slots.expand_as(tokens)
            cache.tokens.scatter_(1, slots, tokens)
            seen = torch.ones_like(cache.real) if valid is None else valid
            cache.real.scatter_(1, slots, seen.gather(1, slots))
            logits = self.function(cache.tokens, cache.real)
            logits = logits.gather(1, slots[..., None].expand(*slots.shape, logits.shape[2]))
        return logits if wanted is None else logits[wanted]

    def new_cache(self, batch_size: int, num_slots: int) -> _Stored:
        empty = torch.zeros(batch_size, num_slots, dtype=torch.int64)
        return _Stored(empty, empty.bool())


def words(num_slots: int) -> Tensor:
    """Every text, in the order of a joint table: int64 [NUM_IDS ** num_slots, num_slots]."""
    return torch.tensor(list(itertools.product(range(NUM_IDS), repeat=num_slots)))


def random_joint(num_slots: int, seed: int = 0) -> Tensor:
    """An uneven law over `words`, float64."""
    weights = torch.rand(NUM_IDS**num_slots, generator=torch.Generator().manual_seed(seed)).double()
    return weights.square() / weights.square().sum()


def masked_model(joint: Tensor, num_slots: int) -> Function:
    """Every slot's law given the slots that are no masks."""
    texts = words(num_slots)
    one_hot = torch.nn.functional.one_hot(texts, NUM_IDS).double()

    def logits(tokens: Tensor, real: Tensor) -> Tensor:
        fits = (tokens[:, None] == texts) | (tokens[:, None] == MASK)
        laws = torch.einsum("bw,wsv->bsv", fits.all(2) * joint, one_hot)
        trap = torch.full((*tokens.shape, 1), 50.0)
        return torch.cat([laws.log(), trap], dim=2)

    return logits


def autoregressive_model(joint: Tensor, num_slots: int) -> Function:
    """The next token's law given all before; one start token comes first."""
    texts = words(num_slots)

    def logits(tokens: Tensor, real: Tensor) -> Tensor:
        laws = torch.zeros(*tokens.shape, NUM_IDS + 1, dtype=torch.float64)
        for slot in range(min(tokens.shape[1], num_slots)):
            fits = (tokens[:, None, 1 : slot + 1] == texts[:, :slot]).all(2) * joint
            laws[:, slot, :NUM_IDS] = torch.stack(
                [fits[:, texts[:, slot] == token].sum(1) for token in range(NUM_IDS)], dim=1
            )
        laws[..., NUM_IDS] = 1e9
        return laws.log()

    return logits


def hash_model(
    num_ids: int = 10, *, is_causal: bool = False, block_size: int | None = None
) -> Function:
    """Logits that depend on every real token and its position, or on those up to the own slot, or
    on those up to the end of its block."""

    def logits(tokens: Tensor, real: Tensor) -> Tensor:
        position = (real.cumsum(1) - 1).clamp(min=0)
        terms = (tokens + 1) * (position * position + 3 * position + 1) * real
        if block_size is None:
            state = terms.cumsum(1) if is_causal else terms.sum(1, keepdim=True)
        else:
            block = position // block_size
            state = (terms[:, None] * (block[:, None] <= block[:, :, None])).sum(2)
        ids = torch.arange(num_ids)
        return 3 * torch.sin(
            (state + 7 * position)[..., None] + 3.0 * ids * (position + 1)[..., None]
        )

    return logits


def p_value(samples: Tensor, law: Tensor) -> float:
    """Chi-square test of texts int64 [n, s] against a law over `words(s)`."""
    powers = NUM_IDS ** torch.arange(samples.shape[1] - 1, -1, -1)
    seen = torch.bincount((samples * powers).sum(1), minlength=len(law))
    possible = law > 0
    assert int(seen[~possible].sum()) == 0
    expected = law[possible] / law.sum() * len(samples)
    return float(stats.chisquare(seen[possible].numpy(), expected.numpy()).pvalue)
