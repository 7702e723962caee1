"""What all samplers share, and the autoregressive one. Needs PyTorch and nothing else.

All randomness is a pure function of (seed, row id, position, step), where the position counts the
real tokens before a slot: a row's text depends neither on the other rows of its batch nor on
padding. Shapes: b rows, L slots, V vocabulary. Exported models carry a copy of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Watch = Callable[[Tensor], None]
"""Called with a copy of all tokens (int64 [b, s]) after every step."""

# What one draw is for; part of the key of the noise.
DRAW_TOKEN, DRAW_ORDER, DRAW_KEPT, DRAW_KIND, DRAW_NOISE = range(5)


class Denoiser(Protocol):
    """The model as a sampler sees it."""

    def __call__(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        slots: Tensor | None = None,
        cache: object | None = None,
        wanted: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Logits of tokens (int64 [b, s]): for the same slot (diffusion) or the next (AR).

        valid (bool [b, s], with a cache [b, L]): False is padding, which no slot sees; None is all
        True. With a cache the tokens lie at `slots` (int64 [s] or [b, s]) of its L slots: their
        keys and values are stored there, and they see every slot stored so far (AR: not those
        behind; block diffusion: not those of later blocks). wanted (bool [b, s]): slots that
        logits are asked for, [n, V] row by row; None is all, [b, s, V]. context (bool, as valid):
        slots that see each other but no other slot.
        """

    def new_cache(self, batch_size: int, num_slots: int) -> object | None:
        """An empty cache; None where no part of a row can be computed alone (experts that choose
        among all its tokens)."""


@dataclass(frozen=True)
class Samples:
    """What a sampler returns."""

    tokens: Tensor
    """int64 [b, L]: the prompts as given, then the new tokens; behind an end nothing but ends."""
    num_new: Tensor
    """int64 [b]: new tokens before the end."""
    num_evaluations: Tensor
    """int64 [b]: forward passes until the row was complete; with guidance each counts twice."""


@dataclass(frozen=True)
class TokenChoice:
    """How a token is drawn from logits."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float | None = None
    """Then from the fewest likeliest that together reach p."""
    forbidden_ids: tuple[int, ...] = ()
    """Never drawn."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits [n, V] as float64, the forbidden ids at minus infinity."""
        logits = logits.to(torch.float64, copy=True)
        logits[:, list(self.forbidden_ids)] = float("-inf")
        if not bool(logits.amax(1).isfinite().all()):  # a NaN counts as the greatest
            raise ValueError("the model's logits are not finite, or every token is forbidden")
        return logits

    def draw(self, allowed: Tensor, uniform: Tensor) -> Tensor:
        """Ids int64 [n] for allowed logits [n, V], each by one uniform number (float64 [n])."""
        if self.temperature == 0:
            return allowed.argmax(1)
        return draw_from(self._weights(allowed), uniform)

    def law(self, allowed: Tensor) -> Tensor:
        """What `draw` draws from: float64 [n, V], every row sums to 1."""
        if self.temperature == 0:
            return functional.one_hot(allowed.argmax(1), allowed.shape[1]).double()
        weights = self._weights(allowed)
        return weights / weights.sum(1, keepdim=True)

    def _weights(self, allowed: Tensor) -> Tensor:
        """The law to draw from, up to a factor: float64 [n, V]."""
        probs = torch.softmax(allowed / self.temperature, dim=1)
        if self.top_k is None and self.top_p is None:
            return probs
        ranked, ids = probs.sort(dim=1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = 0
            ranked = ranked / ranked.sum(1, keepdim=True)
        if self.top_p is not None:
            ranked = ranked.masked_fill(ranked.cumsum(1) - ranked >= self.top_p, 0)
        return torch.zeros_like(probs).scatter(1, ids, ranked)


PLAIN_CHOICE = TokenChoice()


@torch.no_grad()
def sample_autoregressive(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    num_tokens: int,
    choice: TokenChoice = PLAIN_CHOICE,
    valid: Tensor | None = None,
    cache: Literal["exact", "none"] = "exact",
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    watch: Watch | None = None,
) -> Samples:
    """Continue `prompt` (int64 [b, P], P >= 1) by `num_tokens` tokens, left to right.

    `valid` (bool [b, P]) marks the tokens of shorter prompts; their padding is on the left. Cache
    `exact` computes every token once, which changes nothing; `none` computes all in every step. A
    row ends with `eos_id`. `row_ids` (int64 [b], default 0..b-1) name the rows for the noise.
    """
    if cache not in ("exact", "none"):
        raise ValueError(f"cache is {cache!r}; an autoregressive model has exact and none")
    canvas = Canvas(prompt, num_tokens, filler=0, valid=valid, row_ids=row_ids)
    tokens, start = canvas.tokens, prompt.shape[1]
    if start == 0 or not bool(canvas.is_real[:, start - 1].all()):
        raise ValueError("a prompt is empty; give at least one token, such as bos")
    store = denoiser.new_cache(*tokens.shape) if cache == "exact" else None
    ended, evaluations = torch.zeros_like(tokens[:, 0], dtype=torch.bool), canvas.zeros()
    for slot in range(start, tokens.shape[1]):
        fresh = canvas.slots[0 if slot == start or store is None else slot - 1 : slot]
        wanted = (fresh == slot - 1).expand(len(tokens), -1)
        if store is None:
            seen = None if canvas.valid is None else canvas.valid[:, :slot]
            logits = denoiser(tokens[:, fresh], valid=seen, wanted=wanted)
        else:
            logits = denoiser(
                tokens[:, fresh], valid=canvas.valid, slots=fresh, cache=store, wanted=wanted
            )
        noise = uniform(seed, DRAW_TOKEN, canvas.rows[:, slot], canvas.positions[:, slot])
        drawn = choice.draw(choice.allowed(logits), noise)
        evaluations += ~ended
        tokens[:, slot] = drawn if eos_id is None else drawn.masked_fill(ended, eos_id)
        if watch is not None:
            watch(tokens[:, : slot + 1].clone())
        if eos_id is not None:
            ended |= drawn == eos_id
            if bool(ended.all()):
                tokens[:, slot + 1 :] = eos_id
                break
    return Samples(tokens, num_before_end(tokens, canvas.slots >= start, eos_id), evaluations)


class Canvas:
    """The rows to fill: prompts, then `num_tokens` fillers. Checks what the caller gave."""

    def __init__(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        filler: int,
        valid: Tensor | None,
        row_ids: Tensor | None,
    ) -> None:
        _check(prompt, num_tokens, valid, row_ids)
        fillers = (0, num_tokens)
        self.tokens = functional.pad(prompt, fillers, value=filler)
        """int64 [b, L]."""
        real = torch.ones_like(prompt, dtype=torch.bool) if valid is None else valid.bool()
        self.is_real = functional.pad(real, fillers, value=True)
        """bool [b, L]: not padding."""
        self.valid = None if bool(real.all()) else self.is_real
        """The same for the denoiser: None without padding."""
        self.positions = self.is_real.cumsum(1) - 1
        """int64 [b, L]: real slots before."""
        ids = torch.arange(len(prompt)) if row_ids is None else row_ids
        self.rows = ids.to(prompt)[:, None].expand_as(self.tokens)
        """int64 [b, L]: row id of every slot."""
        self.slots = torch.arange(self.tokens.shape[1], device=prompt.device)
        """int64 [L]."""

    def zeros(self) -> Tensor:
        """One int64 0 per row."""
        return torch.zeros_like(self.tokens[:, 0])


def _check(prompt: Tensor, num_tokens: int, valid: Tensor | None, row_ids: Tensor | None) -> None:
    shape = list(prompt.shape)
    if prompt.dim() != 2 or prompt.dtype != torch.int64:
        raise ValueError(f"prompt is {prompt.dtype} {shape}; it must be int64 [b, P]")
    if num_tokens < 0 or shape[0] == 0 or shape[1] + num_tokens == 0:
        raise ValueError(f"num_tokens is {num_tokens} behind prompts {shape}: nothing to sample")
    if valid is not None and valid.shape != prompt.shape:
        raise ValueError(f"valid is {list(valid.shape)}; it must be as the prompt, {shape}")
    if valid is not None and num_tokens and bool((valid[:, 1:] < valid[:, :-1]).any()):
        raise ValueError("a prompt has padding on its right; pad it on its left")
    if row_ids is not None and row_ids.shape != prompt.shape[:1]:
        raise ValueError(f"row_ids has {row_ids.numel()} entries for {shape[0]} prompts")


def draw_from(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids int64 [n], in row i with probabilities proportional to weights[i] ([n, V])."""
    cumulative = weights.cumsum(1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def highest(score: Tensor, candidates: Tensor, count: Tensor | int) -> Tensor:
    """In every row of score [b, L] the `count` ([b, 1]) highest candidates, the leftmost of equals.

    Returns bool [b, L].
    """
    score = score.masked_fill(~candidates, float("-inf"))
    ranking = score.argsort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(score.shape[1], device=score.device) < count).expand_as(ranking)
    return torch.zeros_like(candidates).scatter(1, ranking, chosen) & candidates


def num_before_end(tokens: Tensor, is_new: Tensor, eos_id: int | None) -> Tensor:
    """New tokens (bool [b, L] or [L]) of every row before the first new end: int64 [b]."""
    ends = is_new & (tokens == (-1 if eos_id is None else eos_id))
    return (is_new & (ends.cumsum(1) == 0)).sum(1)


def uniform(seed: int, purpose: int, row: Tensor, position: Tensor, step: int = 0) -> Tensor:
    """float64 in [0, 1), a hash of its arguments; row and position are int64 of one shape.

    52 bits: the product with a float64 then always stays below that number.
    """
    state = torch.full_like(row, seed)
    for word in (torch.full_like(row, purpose), row, position, torch.full_like(row, step)):
        state = _mix(state + (word + 1) * _GOLDEN)
    return _shift_right(state, 12).double() * 2.0**-52


# splitmix64 on int64, which wraps like uint64.
_GOLDEN = -7046029254386353131


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)
