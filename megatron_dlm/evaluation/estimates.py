"""Likelihoods as means or sums over inputs with noise: what all kinds of diffusion share."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_dlm.evaluation.reading import Row, SlotReader, read_rows
from megatron_dlm.ops.counter_rng import Purpose, Stream, uniform

MAX_ENUMERATED_TOKENS = 16

Enumerate = Literal["auto", "never", "always"]


class Request(NamedTuple):
    """Score `answer` behind `prompt`; ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def text(self) -> Tensor:
        """int64 [s]: both."""
        return torch.tensor([*self.prompt, *self.answer])

    @property
    def in_answer(self) -> Tensor:
        """bool [s]"""
        return torch.arange(len(self.prompt) + len(self.answer)) >= len(self.prompt)


@dataclass(frozen=True)
class Likelihood:
    """What a model gives one answer."""

    log_prob: float
    """Nats, of the whole answer; of a diffusion model a lower bound, or an estimate of it."""
    standard_error: float
    """Of log_prob, by the draws of noise; 0 where nothing is drawn, NaN after a single draw."""
    num_samples: int
    """Inputs that were scored."""
    is_greedy: bool = False
    """Whether greedy decoding would write this answer. Masked and block diffusion: the surest token
    first, one per step; hybrid: whether the model, shown the answer, finds each of its tokens
    likeliest. Only asked where `with_greedy` is."""


@dataclass(frozen=True)
class MaskDraws:
    """How diffusion models score answers."""

    num_samples: int = 128
    """Draws of noise per answer; a masked answer of one token takes one."""
    enumerate_masks: Enumerate = "auto"
    """Score every set of masks instead (of block diffusion: every set inside every block): where
    they are no more than num_samples, never, or always. Hybrid noise is always drawn."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.enumerate_masks not in ("auto", "never", "always"):
            raise ValueError(
                f"enumerate_masks is {self.enumerate_masks!r}; use auto, never or always"
            )

    def enumerates(self, num_tokens: int) -> bool:
        """Whether an answer, or a block, of so many tokens is scored on every set of masks."""
        if self.enumerate_masks == "always":
            if num_tokens > MAX_ENUMERATED_TOKENS:
                raise ValueError(
                    f"an answer has {num_tokens} tokens, {2**num_tokens - 1} sets of masks; "
                    f"enumerate_masks always goes up to {MAX_ENUMERATED_TOKENS}, use auto"
                )
            return True
        if num_tokens == 1:
            return True
        return self.enumerate_masks == "auto" and 2**num_tokens - 1 <= self.num_samples


DEFAULT_DRAWS = MaskDraws()


@dataclass
class Drawn:
    """The noisy inputs of one answer, in order of their noise levels."""

    rows: list[Row]
    weights: list[Tensor]
    """float64 [n] or [] each: factors of the numbers read at the slots of a row."""
    is_sum: bool
    """The rows add up to the bound; otherwise each is an estimate of it."""
    estimates: list[float] = field(default_factory=list)
    """What was found, nats."""

    def result(self) -> Likelihood:
        estimates = torch.tensor(self.estimates, dtype=torch.float64)
        if self.is_sum:
            return Likelihood(float(estimates.sum()), 0.0, len(estimates))
        error = stratified_standard_error(estimates)
        return Likelihood(float(estimates.mean()), error, len(estimates))


def score_by_draws(
    reader: SlotReader,
    requests: Sequence[Request],
    draw: Callable[[Request], Drawn],
    *,
    batch_size: int,
) -> list[Likelihood]:
    """The likelihood of every request from the rows that `draw` makes of it."""
    opened: dict[int, Drawn] = {}
    asked: deque[tuple[int, Tensor]] = deque()
    found: dict[int, Likelihood] = {}

    def rows() -> Iterator[Row]:
        for number in by_length(requests):
            opened[number] = draw(requests[number])
            for row, weight in zip(opened[number].rows, opened[number].weights, strict=True):
                asked.append((number, weight))
                yield row

    for _, said in read_rows(reader, rows(), batch_size):
        number, weight = asked.popleft()
        drawn = opened[number]
        drawn.estimates.append(float((said.log_probs * weight).sum()))
        if len(drawn.estimates) == len(drawn.rows):
            found[number] = drawn.result()
            del opened[number]
    return [found[number] for number in range(len(requests))]


def stratified_standard_error(estimates: Tensor) -> float:
    """Standard error of the mean of N estimates (float64 [N]), one of each stratum, in order.

    From successive differences: sqrt(sum of (y_{j+1} - y_j)^2 / (2 N (N - 1))). Each stratum has
    one draw, so its neighbour stands in for a second one; what the means of neighbours differ by is
    counted as noise too, which errs on the safe side. NaN for N = 1.
    """
    count = len(estimates)
    if count < 2:
        return math.nan
    return math.sqrt(float(estimates.diff().square().sum()) / (2 * count * (count - 1)))


def stratified_levels(
    key: Tensor, *, num_samples: int, seed: int, offset: float | None = None
) -> Tensor:
    """(u + j) / N for j = 0..N-1 with one u in [0, 1) per key (int64 []): float64 [N].

    `offset` takes the place of u.
    """
    if offset is None:
        zero = torch.zeros_like(key)
        offset = float(uniform(seed, Stream.LIKELIHOOD, Purpose.NOISE_LEVEL, key, zero))
    return (offset + torch.arange(num_samples).double()) / num_samples


def request_key(request: Request) -> Tensor:
    """Names a request in the noise, int64 []: equal requests get equal noise, wherever they are."""
    text = f"{request.prompt}|{request.answer}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    return torch.tensor(number)


def by_length(requests: Sequence[Request]) -> list[int]:
    """Numbers of the requests, the longest first, so that a batch too large fails at once."""
    return sorted(
        range(len(requests)),
        key=lambda number: -len(requests[number].prompt) - len(requests[number].answer),
    )
