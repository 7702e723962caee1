"""What `mixture_loss` needs of the rows of logits, in torch: the passes over the vocabulary.

Rows are worked off in chunks that stay in the cache; p is the softmax over the text ids, r a ratio
per row (0: no uniform noise, and no pass). `mixture_loss_triton` has the same functions for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.ops.vocab_parallel import (
    VocabShard,
    chunk_buffer,
    no_mass,
    of_peaks,
    row_chunks,
    softmax_of_chunk,
)

# Σ log(1 + r p_v) takes one logarithm for a product of factors. With a mean of r p_v up to the
# higher limit, 16 of them rarely overflow; below the lower one, rounding them would cost digits.
_MIN_MEAN_OF_FACTORS = 0.1
_MAX_MEAN_OF_SIXTEEN = 40.0


@dataclass(frozen=True)
class TextShard:
    """The columns that take part in the softmax: those of this rank's ids but the mask's."""

    shard: VocabShard
    vocab_size: int
    mask_token_id: int
    mask_column: int | None
    """None: another rank holds it."""

    @classmethod
    def of(
        cls, logits: Tensor, vocab_size: int, mask_token_id: int, tp_group: ProcessGroup | None
    ) -> TextShard:
        """The shard of this rank's logits [n, V/tp]."""
        shard = VocabShard.of(logits, vocab_size, tp_group)
        column = mask_token_id - shard.first_id
        is_here = 0 <= column < shard.num_columns
        return cls(shard, vocab_size, mask_token_id, column if is_here else None)

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of every id and whether it is a text id of this rank; 0 and False if not."""
        columns, here = self.shard.columns(ids)
        here &= ids != self.mask_token_id
        return torch.where(here, columns, 0), here

    def choose(self, ids: Tensor, if_text: Tensor, if_mask: Tensor) -> Tensor:
        """Per row by the kind of its id; infinity where it is no id."""
        is_id = (ids >= 0) & (ids < self.vocab_size)
        chosen = torch.where(ids == self.mask_token_id, if_mask, if_text)
        return torch.where(is_id, chosen, torch.inf)

    def real(self, logits: Tensor) -> Tensor:
        """The columns before the padding."""
        return logits[:, : self.shard.num_columns]

    @contextmanager
    def without_mask(self, logits: Tensor) -> Iterator[Tensor]:
        """The columns before the padding, with -inf for the mask as long as the context lasts.

        A copy of the logits would cost a fifth of a softmax; `data`, since autograd must not take
        the loan of one column, which is returned bit for bit, for a change.
        """
        columns = self.real(logits).data
        if self.mask_column is None:
            yield columns
            return
        column = columns[:, self.mask_column]
        original = column.clone()
        column.fill_(-torch.inf)
        try:
            yield columns
        finally:
            column.copy_(original)


@dataclass(frozen=True)
class Softmax:
    """What makes a row of logits l into p_v = exp(l_v - maximum) / exp_sum * share, fp32 [n]."""

    maximum: Tensor
    """Over this rank's columns."""
    exp_sum: Tensor
    """Likewise; 0 where they have no mass."""
    share: Tensor
    """Mass of this rank's columns."""


@dataclass(frozen=True)
class GradientFactors:
    """grad_v = Σ_k at_columns_k ([v = columns_k] - p_v) - background (h_v - p_v Σ_w h_w)
    with h_v = r p_v / (1 + r p_v)."""

    columns: Tensor
    """int64 [2, n]; any column of this rank where it does not hold the id."""
    is_here: Tensor
    """bool [2, n]: this rank holds the id."""
    at_columns: Tensor
    """fp32 [2, n], the same on every rank."""
    background: Tensor
    """fp32 [n]."""
    ratio: Tensor
    """r, fp32 [n]."""
    slope_sum: Tensor
    """Σ_w h_w over all ranks, fp32 [n]; not read by a rank that holds all columns."""


def normalize(
    logits: Tensor, text: TextShard, ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and Σ exp(l_v - maximum) over this rank's columns, fp32 [n]; sums fp32 [2, n].

    With a ratio, where this rank holds all columns, the sums are those of `mixture_sums` (here the
    second is left to the backward pass, which needs h_v anyway); otherwise they are 0.
    """
    maximum, exp_sum = no_mass(logits)
    sums = torch.zeros(2, *maximum.shape, device=logits.device)
    log_sum = sums[0]
    products = None if ratio is None else _products(ratio, text)
    ratios = torch.empty(0) if ratio is None else ratio[:, None]
    with text.without_mask(logits) as columns:
        buffer = chunk_buffer(columns)
        for rows in row_chunks(columns):
            chunk = columns[rows]
            maximum[rows] = chunk.amax(dim=1)
            probabilities = softmax_of_chunk(chunk, buffer)
            torch.amax(probabilities, dim=1, out=exp_sum[rows])
            product = None if products is None else _of_chunk(products[rows])
            if product is not None:
                _log_of_products_(probabilities.mul_(ratios[rows]), product, out=log_sum[rows])
        if ratio is not None:
            _repair_(log_sum, columns, ratios, buffer)
    return *of_peaks(maximum, exp_sum), sums


def mixture_sums(logits: Tensor, text: TextShard, softmax: Softmax, ratio: Tensor) -> Tensor:
    """Σ log(1 + r p_v) and Σ h_v over this rank's columns, fp32 [2, n]."""
    sums = torch.zeros(2, *ratio.shape, device=logits.device)
    log_sum, slope_sum = sums
    products = _products(ratio, text)
    # p is the softmax of this rank's columns times their share; without mass that softmax is NaN.
    local_ratio, has_mass = (ratio * softmax.share)[:, None], softmax.share > 0
    with text.without_mask(logits) as columns:
        buffer, slopes = chunk_buffer(columns), chunk_buffer(columns)
        for rows in row_chunks(columns):
            product = _of_chunk(products[rows])
            if product is None:
                continue
            chunk = softmax_of_chunk(columns[rows], buffer)
            scaled = chunk.mul_(local_ratio[rows])
            slope = torch.add(scaled, 1.0, out=slopes[: chunk.shape[0]])
            torch.sum(torch.div(scaled, slope, out=slope), dim=1, out=slope_sum[rows])
            _log_of_products_(scaled, product, out=log_sum[rows])
        _repair_(log_sum, columns, local_ratio, buffer)
    return torch.where(has_mass, sums, 0.0)


def gradient(logits: Tensor, text: TextShard, softmax: Softmax, factors: GradientFactors) -> Tensor:
    """The gradient that the factors describe, of the logits' shape and dtype; 0 where p is."""
    result = torch.empty_like(logits)
    result[:, text.shard.num_columns :] = 0.0
    has_sum = (factors.ratio > 0).tolist()
    is_split, share = text.shard.is_split, softmax.share[:, None]
    # p is the softmax of this rank's columns times their share.
    pull = -factors.at_columns.sum(dim=0)[:, None] * share
    background = factors.background[:, None]
    push = background * share
    inverse_ratio = torch.where(factors.ratio > 0, factors.ratio.reciprocal(), 1.0)[:, None] / share
    columns_of, at_columns = factors.columns.t(), (factors.at_columns * factors.is_here).t()
    with text.without_mask(logits) as columns:
        buffer, slopes = chunk_buffer(columns), chunk_buffer(columns)
        for rows in row_chunks(columns):
            target = text.real(result)[rows]
            # An fp32 gradient is built in its own memory, others in an fp32 chunk: g * (1 - p)
            # loses all its digits when it is rounded to bf16 before the subtraction.
            in_place = target.dtype == torch.float32 and target.is_contiguous()
            chunk = softmax_of_chunk(columns[rows], target if in_place else buffer)
            if any(has_sum[rows]):
                slope = torch.add(chunk, inverse_ratio[rows], out=slopes[: chunk.shape[0]])
                torch.div(chunk, slope, out=slope)
                total = factors.slope_sum[rows, None] if is_split else slope.sum(1, keepdim=True)
                chunk.mul_(torch.addcmul(pull[rows], push[rows], total))
                chunk.sub_(slope.mul_(background[rows]))
            else:
                chunk.mul_(pull[rows])
            if is_split:
                chunk.masked_fill_(share[rows] == 0, 0.0)  # the softmax of a row of -inf is NaN
            chunk.scatter_add_(1, columns_of[rows], at_columns[rows])
            if not in_place:
                target.copy_(chunk)
    return result


class _Product(IntEnum):
    """How many factors 1 + r p_v share a logarithm."""

    SIXTEEN = 16
    FOUR = 4
    FOUR_SMALL = 3
    """Four near 1, multiplied without losing the digits of r p_v to the 1."""


def _products(ratio: Tensor, text: TextShard) -> list[_Product | None]:
    """What suits each row; None where there is no sum."""
    return [_product_for(mean) for mean in (ratio / text.vocab_size).tolist()]


def _product_for(mean: float) -> _Product | None:
    if mean == 0.0:
        return None
    if mean < _MIN_MEAN_OF_FACTORS:
        return _Product.FOUR_SMALL
    return _Product.SIXTEEN if mean < _MAX_MEAN_OF_SIXTEEN else _Product.FOUR


def _of_chunk(products: list[_Product | None]) -> _Product | None:
    """The most careful of the rows' products; None if no row has a sum."""
    return min((product for product in products if product is not None), default=None)


def _repair_(log_sum: Tensor, columns: Tensor, ratio: Tensor, buffer: Tensor) -> None:
    """Where tokens of one product held so much mass that it overflowed: a logarithm for each."""
    overflown = log_sum.isfinite().logical_not_().nonzero()[:, 0]
    for of_chunk in torch.split(overflown, max(1, buffer.shape[0])):
        values = softmax_of_chunk(columns[of_chunk], buffer).mul_(ratio[of_chunk])
        log_sum[of_chunk] = values.log1p_().sum(dim=1)


def _log_of_products_(values: Tensor, product: _Product, out: Tensor) -> None:
    """Σ log(1 + values) per row, overwriting the values; infinite if a product overflows."""
    num_factors = 4 if product is _Product.FOUR_SMALL else int(product)
    num_rows, width = values.shape
    length = width // num_factors
    whole = num_factors * length
    rest = values[:, whole:].log1p().sum(dim=1) if whole < width else None
    values = values[:, :whole]
    if product is _Product.FOUR_SMALL:
        logarithms = _product_(_product_(values)).log1p_()
    else:
        logarithms = values.add_(1.0).view(num_rows, num_factors, length).prod(dim=1).log_()
    torch.sum(logarithms, dim=1, out=out)
    if rest is not None:
        out += rest


def _product_(values: Tensor) -> Tensor:
    """(1 + a)(1 + b) - 1 of the two halves of every row."""
    first, second = values.chunk(2, dim=1)
    return first.addcmul_(first, second).add_(second)
