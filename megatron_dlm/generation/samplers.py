"""Text from a model: autoregressive and masked-diffusion samplers. Needs PyTorch and nothing else.

A denoiser maps tokens int64 [b, S] to logits [b, S, V]. All randomness is a pure function of (seed,
row id, position, step), so a row's text does not depend on the other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor], Tensor]
RevealOrder = Literal["ancestral", "low_confidence", "random"]

# What one draw is for; part of the key of the noise.
_TOKEN, _REVEAL = 0, 1


@torch.no_grad()
def sample_autoregressive(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    forbidden_ids: Sequence[int] = (),
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
) -> Tensor:
    """Continue `prompt` (int64 [b, P], P >= 1) by `num_tokens` tokens, left to right: [b, P + num].

    `denoiser` gives at slot i the logits of token i + 1. Temperature 0 takes the likeliest token;
    `forbidden_ids` are never emitted. After `eos_id` a row holds nothing but `eos_id`. `row_ids`
    (int64 [b], default 0..b-1) name the rows for the noise.
    """
    choice = _Choice(temperature, top_k, top_p, tuple(forbidden_ids))
    _check_prompt(prompt, num_tokens)
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, such as bos")
    rows = _row_ids(prompt, row_ids)
    length = prompt.shape[1] + num_tokens
    tokens = prompt.clone()
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for position in range(prompt.shape[1], length):
        probs = choice.probs(denoiser(tokens)[:, -1])  # [b, V]
        drawn = _draw(probs, _uniform(seed, _TOKEN, rows, torch.full_like(rows, position), 0))
        if eos_id is not None:
            drawn = torch.where(ended, eos_id, drawn)
            ended = drawn == eos_id
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        if eos_id is not None and bool(ended.all()):
            break
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=eos_id)


@torch.no_grad()
def sample_masked(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    num_tokens: int,
    num_steps: int,
    mask_id: int,
    order: RevealOrder = "ancestral",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    forbidden_ids: Sequence[int] = (),
    seed: int = 0,
    row_ids: Tensor | None = None,
) -> Tensor:
    """Fill `num_tokens` masks after `prompt` (int64 [b, P]) in `num_steps` steps: [b, P + num].

    `denoiser` gives at slot i the logits of token i. `order` says what a step reveals:
    ancestral: the reverse process of the linear schedule, each mask with probability
    1 / (steps left); low_confidence: an equal share per step, the tokens that the model gives the
    highest probability, so that the unsure ones wait; random: an equal share in random order.
    Temperature 0 takes the likeliest tokens. The mask and `forbidden_ids` are never emitted.
    Steps that reveal nothing do not call the denoiser. `row_ids` as in `sample_autoregressive`.
    """
    choice = _Choice(temperature, top_k, top_p, (mask_id, *forbidden_ids))
    _check_prompt(prompt, num_tokens)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if order not in ("ancestral", "low_confidence", "random"):
        raise ValueError(f"order is {order!r}; use ancestral, low_confidence or random")
    masks = prompt.new_full((prompt.shape[0], num_tokens), mask_id)
    tokens = torch.cat([prompt, masks], dim=1)
    positions = torch.arange(tokens.shape[1], device=prompt.device).expand_as(tokens)
    rows = _row_ids(prompt, row_ids)[:, None].expand_as(tokens)
    hidden = positions >= prompt.shape[1]
    for step in range(num_steps):
        share = (step + 1) * num_tokens // num_steps - step * num_tokens // num_steps
        # Only the low-confidence order has to ask the model before it can choose.
        if order == "ancestral":
            noise = _uniform(seed, _REVEAL, rows, positions, step)
            reveal = hidden & (noise * (num_steps - step) < 1)
        elif order == "random":
            reveal = _best(_uniform(seed, _REVEAL, rows, positions, 0), hidden, share)
        else:
            reveal = hidden & (share > 0)
        if not bool(reveal.any()):
            continue
        logits = denoiser(tokens)[reveal]  # [n, V]
        drawn = _draw(
            choice.probs(logits), _uniform(seed, _TOKEN, rows[reveal], positions[reveal], step)
        )
        candidate = tokens.masked_scatter(reveal, drawn)
        if order == "low_confidence":
            confidence = choice.plain_probs(logits).gather(1, drawn[:, None])[:, 0]
            score = torch.zeros_like(tokens, dtype=confidence.dtype)
            reveal = _best(score.masked_scatter(reveal, confidence), hidden, share)
        tokens = torch.where(reveal, candidate, tokens)
        hidden = hidden & ~reveal
    return tokens


@dataclass(frozen=True)
class _Choice:
    """How the next token is drawn from logits."""

    temperature: float
    top_k: int | None
    top_p: float | None
    forbidden_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")

    def plain_probs(self, logits: Tensor) -> Tensor:
        """The model's own distribution over the allowed ids: logits [n, V] -> float64 [n, V]."""
        return torch.softmax(self._allowed(logits), dim=1)

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution to draw from: logits [n, V] -> float64 [n, V].

        top_k keeps the k likeliest tokens, then top_p the fewest likeliest that together reach p.
        """
        allowed = self._allowed(logits)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(allowed.argmax(1), logits.shape[1]).double()
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

    def _allowed(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.float64, copy=True)
        logits[:, list(self.forbidden_ids)] = float("-inf")
        return logits


def _check_prompt(prompt: Tensor, num_tokens: int) -> None:
    if prompt.dim() != 2 or prompt.dtype != torch.int64:
        raise ValueError(f"prompt is {prompt.dtype} {list(prompt.shape)}; it must be int64 [b, P]")
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}; it must be at least 0")


def _row_ids(prompt: Tensor, row_ids: Tensor | None) -> Tensor:
    if row_ids is None:
        return torch.arange(prompt.shape[0], device=prompt.device)
    if row_ids.shape != prompt.shape[:1]:
        raise ValueError(f"row_ids has {row_ids.numel()} entries for {prompt.shape[0]} prompts")
    return row_ids.to(device=prompt.device, dtype=torch.int64)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids int64 [n], one per row of weights [n, V], which need not sum to 1: inverts the sums."""
    cumulative = weights.cumsum(1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """In every row of score [b, S] the `count` highest candidates, the leftmost of equals: bool."""
    ranking = score.masked_fill(~candidates, -1.0).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(candidates).scatter(1, ranking[:, :count], True) & candidates


def _uniform(seed: int, purpose: int, row: Tensor, position: Tensor, step: int) -> Tensor:
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
