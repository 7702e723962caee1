"""log p(answer | prompt) in nats: exact for autoregressive models, a bound for masked diffusion.

Masked models score an answer of l tokens behind a clean prompt by the any-order bound

    -log p(answer | prompt)  <=  E_n E_S [ (l / n) * sum over S of -log p(token | the rest) ],

n uniform on 1..l, S a uniform set of n masked tokens of the answer. It is the count form of the
training bound, estimated as LLaDA does (arXiv 2502.09992): N sets, their sizes n spread evenly over
1..l. An answer that has no more than N sets, 2^l - 1, is scored on all of them instead: that is the
bound itself, at no greater cost.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_dlm.evaluation.reading import Row, SlotReader, open_reader, read_rows
from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.objectives.masked import mask_by_count
from megatron_dlm.ops.counter_rng import Purpose, Stream, random_bits, uniform

MAX_ENUMERATED_TOKENS = 16

Enumerate = Literal["auto", "never", "always"]


class Request(NamedTuple):
    """Score `answer` behind `prompt`; ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """What a model gives one answer."""

    log_prob: float
    """Nats, of the whole answer; of a masked model a lower bound, or an estimate of it."""
    standard_error: float
    """Of log_prob, by the draws of masks; 0 where nothing is drawn, NaN after a single draw."""
    num_samples: int
    """Inputs that were scored."""
    is_greedy: bool = False
    """Whether greedy decoding would write this answer; masked: the surest token first, one per
    step. Only asked where `with_greedy` is."""


@dataclass(frozen=True)
class MaskDraws:
    """How masked answers are scored."""

    num_samples: int = 128
    """Sets of masked tokens per answer of several tokens; an answer of one token takes one."""
    enumerate_masks: Enumerate = "auto"
    """Score every set instead: where they are no more than num_samples, never, or always."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.enumerate_masks not in ("auto", "never", "always"):
            raise ValueError(
                f"enumerate_masks is {self.enumerate_masks!r}; use auto, never or always"
            )

    def enumerates(self, num_tokens: int) -> bool:
        """Whether an answer of so many tokens is scored on every set of masks."""
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


def score(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    draws: MaskDraws = DEFAULT_DRAWS,
    batch_size: int = 32,
    with_greedy: bool = False,
) -> list[Likelihood]:
    """The likelihood of every request, in order; it depends on no other request.

    Raises ValueError for an empty answer, one that leaves the model's length, an autoregressive
    answer without a prompt, and a model whose objective is unknown here.
    """
    check_objective(model)
    limit = longest_text(model)
    for request in requests:
        _check(request, limit, model)
    reader = open_reader(model)
    if model.objective_kind == "autoregressive":
        return score_autoregressive(reader, requests, batch_size=batch_size)
    assert model.mask_token_id is not None
    return score_masked(
        reader,
        requests,
        mask_id=model.mask_token_id,
        draws=draws,
        batch_size=batch_size,
        with_greedy=with_greedy,
    )


def check_objective(model: LoadedModel) -> None:
    """Refuse a model whose likelihood is not known here."""
    if model.objective_kind not in ("autoregressive", "masked"):
        raise ValueError(
            f"{model.source} was trained with objective.kind {model.objective_kind}; likelihoods "
            "are known for autoregressive and masked models"
        )
    if model.objective_kind == "masked" and model.mask_token_id is None:
        raise ValueError(f"{model.source} is a masked model but names no mask id")


def longest_text(model: LoadedModel) -> int:
    """Tokens of prompt and answer together; the last of an autoregressive text is not read."""
    return model.max_length + (model.objective_kind == "autoregressive")


def _check(request: Request, limit: int, model: LoadedModel) -> None:
    if not request.answer:
        raise ValueError("an answer is empty; there is nothing to score")
    if not request.prompt and model.objective_kind == "autoregressive":
        raise ValueError("an autoregressive answer needs a prompt of at least one token")
    length = len(request.prompt) + len(request.answer)
    if length > limit:
        raise ValueError(
            f"prompt and answer have {length} tokens; {model.source} takes {limit}: shorten them"
        )


def score_autoregressive(
    reader: SlotReader, requests: Sequence[Request], *, batch_size: int
) -> list[Likelihood]:
    """Exact: the sum over the answer's tokens, by one pass. Prompts hold at least one token."""
    order = _by_length(requests)

    def rows() -> Iterator[Row]:
        for number in order:
            prompt, answer = requests[number]
            tokens = torch.tensor([*prompt, *answer])
            slots = torch.arange(len(prompt) - 1, len(tokens) - 1)
            yield Row(tokens[:-1], slots, tokens[len(prompt) :])

    found: dict[int, Likelihood] = {}
    answers = read_rows(reader, rows(), batch_size)
    for number, (row, said) in zip(order, answers, strict=True):
        is_greedy = bool((said.likeliest == row.targets).all())
        found[number] = Likelihood(float(said.log_probs.sum()), 0.0, 1, is_greedy)
    return [found[number] for number in range(len(requests))]


def score_masked(
    reader: SlotReader,
    requests: Sequence[Request],
    *,
    mask_id: int,
    draws: MaskDraws = DEFAULT_DRAWS,
    batch_size: int,
    with_greedy: bool = False,
) -> list[Likelihood]:
    """Lower bounds of the log-likelihoods, with the standard errors of the estimates."""
    order = _by_length(requests)
    tallies: dict[int, _Tally] = {}
    asked: deque[int] = deque()
    found: dict[int, Likelihood] = {}

    def rows() -> Iterator[Row]:
        for number in order:
            tallies[number] = _open_tally(requests[number], draws)
            for masked in tallies[number].masked:
                asked.append(number)
                yield _masked_row(requests[number], masked, mask_id)

    for _, said in read_rows(reader, rows(), batch_size):
        number = asked.popleft()
        tally = tallies[number]
        tally.sums.append(float(said.log_probs.sum()))
        if len(tally.sums) == len(tally.masked):
            found[number] = tally.result()
            del tallies[number]
    if with_greedy:
        greedy = _greedy(reader, requests, mask_id=mask_id, batch_size=batch_size)
        found = {number: replace(one, is_greedy=number in greedy) for number, one in found.items()}
    return [found[number] for number in range(len(requests))]


@dataclass
class _Tally:
    """The sets of masks of one answer, in order of size, and what was found on them."""

    masked: Tensor
    """bool [m, l]"""
    weights: Tensor
    """float64 [m]: factor of a set's sum in its estimate of the bound, l / n."""
    shares: Tensor | None
    """float64 [m]: probabilities of all sets, which sum to 1; None where the sets are drawn."""
    sums: list[float] = field(default_factory=list)
    """Log-probability of the masked tokens of every set, nats."""

    def result(self) -> Likelihood:
        estimates = torch.tensor(self.sums, dtype=torch.float64) * self.weights
        if self.shares is not None:
            return Likelihood(float((estimates * self.shares).sum()), 0.0, len(estimates))
        return Likelihood(
            float(estimates.mean()), stratified_standard_error(estimates), len(estimates)
        )


def _open_tally(request: Request, draws: MaskDraws) -> _Tally:
    length = len(request.answer)
    if draws.enumerates(length):
        return _every_set(length)
    key = torch.tensor(request_key(request))
    masked, weights, _ = draw_sets(
        key, torch.ones(length, dtype=torch.bool), num_samples=draws.num_samples, seed=draws.seed
    )
    return _Tally(masked, weights, shares=None)


def _every_set(length: int) -> _Tally:
    """All non-empty sets; each size is as probable as the others, as are the sets of one size."""
    numbers = torch.arange(1, 2**length)
    masked = (numbers[:, None] >> torch.arange(length)) % 2 == 1
    sizes = masked.sum(1)
    num_of_size = torch.tensor([math.comb(length, int(size)) for size in sizes])
    return _Tally(masked, length / sizes.double(), 1.0 / (length * num_of_size.double()))


def draw_sets(
    key: Tensor, valid: Tensor, *, num_samples: int, seed: int, offset: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sets of masked tokens among the l valid ones (bool [s]), their sizes spread evenly over 1..l.

    Set j of N has 1 + floor(l (u + j) / N) tokens, u uniform in [0, 1): every size is as probable
    as the others, and the sets come in order of size. key: int64 [], names the text in the noise;
    `offset` takes the place of u. Returns masked bool [N, s], weights l / n float64 [N], and n / l
    float64 [N].
    """
    if offset is None:
        zero = torch.zeros_like(key)
        offset = float(uniform(seed, Stream.LIKELIHOOD, Purpose.NOISE_LEVEL, key, zero))
    samples = torch.arange(num_samples)
    levels = (offset + samples.double()) / num_samples
    keys = random_bits(seed, Stream.LIKELIHOOD, Purpose.VALUE, key, samples)
    slots = torch.arange(len(valid))
    bits = random_bits(seed, Stream.LIKELIHOOD, Purpose.MASK, keys[:, None], slots[None])
    every = valid.expand(num_samples, -1)
    corruption = mask_by_count(levels[:, None], bits, every)
    return corruption.masked, corruption.elbo_weight[:, 0], corruption.noise_level[:, 0]


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


def request_key(request: Request) -> int:
    """Names a request in the noise: equal requests get equal noise, wherever they stand."""
    text = f"{request.prompt}|{request.answer}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _masked_row(request: Request, masked: Tensor, mask_id: int) -> Row:
    answer = torch.tensor(request.answer)
    tokens = torch.cat(
        [torch.tensor(request.prompt, dtype=torch.int64), answer.masked_fill(masked, mask_id)]
    )
    return Row(tokens, masked.nonzero()[:, 0] + len(request.prompt), answer[masked])


def _greedy(
    reader: SlotReader, requests: Sequence[Request], *, mask_id: int, batch_size: int
) -> set[int]:
    """The requests whose answer greedy decoding writes: an answer leaves at its first other token.

    Every step fills the mask whose likeliest token is the most probable; the first of equals.
    """
    order = _by_length(requests)
    hidden = {
        number: torch.ones(len(requests[number].answer), dtype=torch.bool) for number in order
    }
    greedy = set()
    while hidden:
        numbers = list(hidden)
        rows = (_masked_row(requests[number], hidden[number], mask_id) for number in numbers)
        answers = list(read_rows(reader, rows, batch_size))
        for number, (row, said) in zip(numbers, answers, strict=True):
            surest = int(said.likeliest_log_probs.argmax())
            if int(said.likeliest[surest]) != int(row.targets[surest]):
                del hidden[number]
                continue
            hidden[number][int(row.slots[surest]) - len(requests[number].prompt)] = False
            if not bool(hidden[number].any()):
                greedy.add(number)
                del hidden[number]
    return greedy


def _by_length(requests: Sequence[Request]) -> list[int]:
    """Numbers of the requests, the longest first, so that a batch too large fails at once."""
    return sorted(
        range(len(requests)),
        key=lambda number: -len(requests[number].prompt) - len(requests[number].answer),
    )
