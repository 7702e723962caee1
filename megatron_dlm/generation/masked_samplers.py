"""Samplers of masked diffusion. Needs PyTorch and samplers.py, nothing else.

Exported models carry a copy of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from megatron_dlm.generation.samplers import (
    DRAW_ORDER,
    DRAW_TOKEN,
    PLAIN_CHOICE,
    Canvas,
    Denoiser,
    Samples,
    TokenChoice,
    Watch,
    highest,
    num_before_end,
    uniform,
)

RevealOrder = Literal[
    "first_hitting", "ancestral", "random", "low_confidence", "top_margin", "entropy"
]
Cache = Literal["exact", "none", "prompt", "prefix", "dual"]

_SCORED = ("low_confidence", "top_margin", "entropy")  # the model is asked before some are chosen


@dataclass(frozen=True)
class MaskedDecoding:
    """How masks are filled.

    order: first_hitting, the exact reverse process, one token per pass (Zheng et al., arXiv
    2409.02908: the slots' times are independent and uniform, and a model without time input needs
    their order only); ancestral, the same cut into num_steps steps, a mask's step being that of its
    time, so that tokens of one step do not see each other; random, an equal share per step in
    random order; low_confidence, top_margin, entropy, an equal share per step, the surest tokens
    first, so that the unsure ones wait. Sure is: the drawn token is probable, the likeliest is far
    ahead of the next, the entropy is low.

    cache: whose keys and values a step takes from an earlier one. Attention goes in both
    directions, so all depend on all: only `none` is exact, and `exact` is the same. prompt: the
    prompt's, computed once before anything is revealed. prefix: all left of the block; dual: all
    but the block (both: Fast-dLLM, arXiv 2505.22618). A block begins by computing all again.
    """

    order: RevealOrder = "first_hitting"
    num_steps: int | None = None
    """Steps for the whole row, shared evenly by its blocks; None is one per token."""
    block_size: int | None = None
    """Fill blocks of this many slots one after the other, from the left; None is one block."""
    threshold: float | None = None
    """Reveal all tokens surer than this, at least one per step; for low_confidence."""
    guidance: float = 0.0
    """w in free + (1 + w) (logits - free), where free sees masks for the prompt; 0 is off."""
    cache: Cache = "exact"

    def __post_init__(self) -> None:
        for name, kind in (("order", RevealOrder), ("cache", Cache)):
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {names}")
        for name in ("num_steps", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not self.guidance >= 0:
            raise ValueError(f"guidance is {self.guidance}; it must be at least 0")
        if self.cache in ("prefix", "dual") and self.block_size is None:
            raise ValueError(f"cache {self.cache} works block by block; give block_size")
        self._check_steps()

    def _check_steps(self) -> None:
        if self.threshold is not None:
            if self.order != "low_confidence":
                raise ValueError(f"a threshold needs order low_confidence, not {self.order}")
            if not 0 <= self.threshold <= 1:
                raise ValueError(f"threshold is {self.threshold}; it must lie in [0, 1]")
        takes_what_it_needs = self.threshold is not None or self.order == "first_hitting"
        if self.num_steps is not None and takes_what_it_needs:
            reason = f"order {self.order}" if self.threshold is None else "a threshold"
            raise ValueError(f"num_steps is {self.num_steps}; {reason} takes as many as it needs")


REVERSE_PROCESS = MaskedDecoding()


@torch.no_grad()
def sample_masked(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    mask_id: int,
    num_tokens: int = 0,
    decoding: MaskedDecoding = REVERSE_PROCESS,
    choice: TokenChoice = PLAIN_CHOICE,
    valid: Tensor | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    watch: Watch | None = None,
) -> Samples:
    """Put `num_tokens` masks behind `prompt` (int64 [b, P]), then fill all masks of every row.

    Without new masks this fills a template. A row ends with the first new `eos_id` that has no mask
    before it; the mask is never drawn; steps that reveal nothing do not call the model. All else is
    as in `sample_autoregressive`.
    """
    choice = replace(choice, forbidden_ids=(*choice.forbidden_ids, mask_id))
    canvas = Canvas(prompt, num_tokens, filler=mask_id, valid=valid, row_ids=row_ids)
    is_new = (canvas.tokens == mask_id) & canvas.is_real
    plan = _divide(is_new, decoding)
    reader = _Reader(denoiser, decoding, canvas, is_new, mask_id)
    return fill_masks(
        canvas,
        plan,
        reader,
        mask_id=mask_id,
        decoding=decoding,
        choice=choice,
        eos_id=eos_id,
        seed=seed,
        watch=watch,
    )


@dataclass(frozen=True)
class Plan:
    """In which order blocks are filled, and in how many steps."""

    block_of: Tensor
    """int64 [b, L]: number of the block that a slot is filled in; -1 where nothing is to fill."""
    num_steps: Tensor | None
    """int64 [b, K]: steps of every block; None is one per token."""


class Reader(Protocol):
    """Logits of masks, block by block."""

    cost: int
    """Forward passes of one reading."""

    def open_block(self, block: int) -> None:
        """Blocks come in order; those without a mask too."""

    def logits(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """[n, V] of the n wanted slots (bool [b, L]) of the open block, row by row."""


def fill_masks(
    canvas: Canvas,
    plan: Plan,
    reader: Reader,
    *,
    mask_id: int,
    decoding: MaskedDecoding,
    choice: TokenChoice,
    eos_id: int | None,
    seed: int,
    watch: Watch | None,
) -> Samples:
    """Fill the planned masks of the canvas; `choice` never draws the mask."""
    tokens, is_new = canvas.tokens, plan.block_of >= 0
    order_noise = uniform(seed, DRAW_ORDER, canvas.rows, canvas.positions)
    evaluations = canvas.zeros()
    for block in range(int(plan.block_of.max()) + 1):
        reader.open_block(block)
        hidden = (tokens == mask_id) & (plan.block_of == block)
        num_steps = None if plan.num_steps is None else plan.num_steps[:, block, None]
        order = _Order(decoding, hidden, num_steps, order_noise)
        for step in range(order.max_steps):
            wanted = order.candidates(hidden, step)
            if not bool(wanted.any()):
                continue
            logits = choice.allowed(reader.logits(tokens, wanted))
            at = canvas.rows[wanted], canvas.positions[wanted]
            drawn = choice.draw(logits, uniform(seed, DRAW_TOKEN, *at, order.draw_number(step)))
            revealed = order.revealed(wanted, step, logits, drawn)
            tokens = tokens.masked_scatter(wanted, drawn).where(revealed, tokens)
            if eos_id is not None:
                tokens = _end_rows(tokens, is_new, mask_id, eos_id)
            hidden &= tokens == mask_id
            evaluations += wanted.any(1) * reader.cost
            if watch is not None:
                watch(tokens)
    return Samples(tokens, num_before_end(tokens, is_new, eos_id), evaluations)


class _Order:
    """Which masks of one block a step reveals. All is by row: another row changes nothing."""

    def __init__(
        self, decoding: MaskedDecoding, hidden: Tensor, num_steps: Tensor | None, noise: Tensor
    ) -> None:
        self._decoding, self._noise = decoding, noise
        self._total = hidden.sum(1, keepdim=True)  # [b, 1]
        self._steps = (self._total if num_steps is None else num_steps).clamp(min=1)
        self._is_scored = decoding.order in _SCORED
        self.max_steps = int(self._steps.max())

    def draw_number(self, step: int) -> int:
        """The step in the key of a token's noise; where a mask is drawn once, it does not count."""
        return step if self._is_scored else 0

    def candidates(self, hidden: Tensor, step: int) -> Tensor:
        """The masks to ask the model about: those to reveal, or all where it has to be asked."""
        if self._decoding.order == "ancestral":
            return hidden & (self._noise * self._steps < step + 1)
        share = self._share(step)
        return hidden & (share > 0) if self._is_scored else highest(-self._noise, hidden, share)

    def revealed(self, wanted: Tensor, step: int, logits: Tensor, drawn: Tensor) -> Tensor:
        """Of the candidates those that keep their drawn token; logits [n, V], drawn [n]."""
        if not self._is_scored:
            return wanted
        sureness = _sureness(self._decoding.order, torch.softmax(logits, dim=1), drawn)
        score = torch.zeros_like(self._noise).masked_scatter(wanted, sureness)
        best = highest(score, wanted, self._share(step))
        threshold = self._decoding.threshold
        return best if threshold is None else best | (wanted & (score > threshold))

    def _share(self, step: int) -> Tensor:
        """How many tokens this step reveals in every row: int64 [b, 1]."""
        total, steps = self._total, self._steps
        return (step + 1) * total // steps - step * total // steps


def _sureness(order: RevealOrder, probs: Tensor, drawn: Tensor) -> Tensor:
    """float64 [n] for probs [n, V]."""
    if order == "low_confidence":
        return probs.gather(1, drawn[:, None])[:, 0]
    if order == "top_margin":
        return probs.topk(2).values.diff(dim=1)[:, 0].neg()
    return torch.special.entr(probs).sum(1).neg()


def _divide(is_new: Tensor, decoding: MaskedDecoding) -> Plan:
    """Blocks that begin at a row's first mask and share its steps evenly."""
    slots = torch.arange(is_new.shape[1], device=is_new.device)
    size = decoding.block_size or len(slots)
    block_of = ((slots - is_new.int().argmax(1, keepdim=True)) // size).masked_fill(~is_new, -1)
    if decoding.num_steps is None:
        return Plan(block_of, None)
    num_blocks = (block_of.amax(1, keepdim=True) + 1).clamp(min=1)
    uneven = num_blocks[decoding.num_steps % num_blocks != 0].tolist()
    if uneven:
        raise ValueError(
            f"num_steps is {decoding.num_steps} for {uneven[0]} blocks of {size} tokens; "
            f"give a multiple of {uneven[0]}"
        )
    steps = (decoding.num_steps // num_blocks).expand(-1, int(num_blocks.max()))
    return Plan(block_of, steps)


def _end_rows(tokens: Tensor, is_new: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Nothing but ends behind the first new end that has no mask before it."""
    num_masks_before = (is_new & (tokens == mask_id)).cumsum(1)
    ends = is_new & (tokens == eos_id) & (num_masks_before == 0)
    return tokens.masked_fill(is_new & (ends.cumsum(1) > 0), eos_id)


class _Reader:
    """Logits of chosen slots, with guidance and by way of the cache."""

    def __init__(
        self,
        denoiser: Denoiser,
        decoding: MaskedDecoding,
        canvas: Canvas,
        is_new: Tensor,
        mask_id: int,
    ) -> None:
        self.cost = 1
        """Forward passes of one reading."""
        if decoding.guidance:
            self.cost = 2
            given = canvas.is_real & ~is_new
            denoiser = _Guided(denoiser, given, mask_id, decoding.guidance)
        self._denoiser, self._valid, self._slots = denoiser, canvas.valid, canvas.slots
        self._kind, self._block_size = decoding.cache, decoding.block_size or len(canvas.slots)
        self._cache = None
        if decoding.cache not in ("exact", "none"):
            self._start = _common_start(is_new, decoding.cache)
            self._cache = denoiser.new_cache(*is_new.shape)
            if self._cache is None:
                raise ValueError(
                    f"cache {decoding.cache} computes a part of a text, but the experts of this "
                    "model choose among all of its tokens; take cache none"
                )

    def open_block(self, block: int) -> None:
        """Say which slots the steps of this block compute again."""
        if self._cache is None:
            return
        is_by_block = self._kind != "prompt"
        start = self._start + block * self._block_size * is_by_block
        stop = start + self._block_size if self._kind == "dual" else None
        self._window = self._slots[start:stop]
        self._is_stale = is_by_block or block == 0

    def logits(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """[n, V] of the n wanted slots (bool [b, L]), row by row."""
        if self._cache is None:
            return self._denoiser(tokens, valid=self._valid, wanted=wanted)
        slots = self._slots if self._is_stale else self._window
        self._is_stale = False
        return self._denoiser(
            tokens[:, slots],
            valid=self._valid,
            slots=slots,
            cache=self._cache,
            wanted=wanted[:, slots],
        )


def _common_start(is_new: Tensor, cache: Cache) -> int:
    starts = is_new.int().argmax(1)[is_new.any(1)].unique().tolist()
    if len(starts) > 1:
        raise ValueError(
            f"cache {cache} needs the first masks of all rows at one slot, they are at {starts}; "
            "take cache none or one row at a time"
        )
    return starts[0] if starts else 0


class _Guided:
    """Classifier-free guidance as a denoiser: every call runs the rows and their free twins."""

    def __init__(self, denoiser: Denoiser, given: Tensor, mask_id: int, weight: float) -> None:
        self._denoiser, self._given, self._mask_id = denoiser, given, mask_id
        self._weight = weight

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
        assert wanted is not None
        assert context is None
        given = self._given if slots is None else self._given[:, slots]
        both = torch.cat([tokens, tokens.masked_fill(given, self._mask_id)])
        valid = None if valid is None else valid.repeat(2, 1)
        logits, free = self._denoiser(
            both, valid=valid, slots=slots, cache=cache, wanted=wanted.repeat(2, 1)
        ).chunk(2)
        return free + (1 + self._weight) * (logits - free)

    def new_cache(self, batch_size: int, num_slots: int) -> object | None:
        return self._denoiser.new_cache(2 * batch_size, num_slots)
