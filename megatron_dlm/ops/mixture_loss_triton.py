"""The passes of `mixture_rows` as Triton kernels: one program per row of logits.

Σ log(1 + r p_v) needs the log-sum-exp first, and no rescaling turns the sum under one normaliser
into that under another, so the forward pass reads a row twice. The second reading finds it in the
L2 cache: the rows at work at a time (one or a few per multiprocessor, 256 KiB each in bf16 with
131k columns) are about the size of it. The backward pass reads logits and writes gradients once.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.ops.mixture_rows import GradientFactors, Softmax, TextShard

_MAX_BLOCK = 4096
_NUM_WARPS = 8


class _Layout(NamedTuple):
    """Where the columns of a row lie; kernels take it as one argument."""

    stride: int
    """Elements from a row of logits to the next."""
    result_stride: int
    """Likewise of their gradient."""
    width: int
    num_columns: int
    """Columns of real ids, before the padding."""
    mask_column: int
    """-1: another rank holds it."""


class _ForwardRows(NamedTuple):
    """fp32 [n] each; the last two are written."""

    maximum: Tensor
    exp_sum: Tensor
    ratio: Tensor
    log_sum: Tensor
    slope_sum: Tensor


class _BackwardRows(NamedTuple):
    """[n] each: int64 columns, otherwise fp32."""

    maximum: Tensor
    scale: Tensor
    ratio: Tensor
    background: Tensor
    pull: Tensor
    first: Tensor
    second: Tensor
    at_first: Tensor
    at_second: Tensor


def normalize(
    logits: Tensor, text: TextShard, ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mixture_rows.normalize`, and the second of the sums is filled as well."""
    logits = _rows(logits)
    num_rows = logits.shape[0]
    maximum, exp_sum, *sums = torch.zeros(4, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows > 0:
        _normalize_kernel[(num_rows,)](
            logits,
            _ForwardRows(maximum, exp_sum, exp_sum if ratio is None else ratio, *sums),
            _layout(logits, text, logits),
            has_ratio=ratio is not None,
            block=_block(text.shard.num_columns),
            num_warps=_NUM_WARPS,
        )
    return maximum, exp_sum, torch.stack(sums)


def mixture_sums(logits: Tensor, text: TextShard, softmax: Softmax, ratio: Tensor) -> Tensor:
    """As `mixture_rows.mixture_sums`."""
    logits = _rows(logits)
    sums = torch.zeros(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0] > 0:
        scaled_ratio = ratio * _scale(softmax)
        _sums_kernel[(logits.shape[0],)](
            logits,
            _ForwardRows(softmax.maximum, softmax.exp_sum, scaled_ratio, *sums),
            _layout(logits, text, logits),
            block=_block(text.shard.num_columns),
            num_warps=_NUM_WARPS,
        )
    return sums


def gradient(logits: Tensor, text: TextShard, softmax: Softmax, factors: GradientFactors) -> Tensor:
    """As `mixture_rows.gradient`; the slope sum is always read."""
    logits = _rows(logits)
    result = torch.empty_like(logits)
    if logits.shape[0] > 0:
        rows = _BackwardRows(
            softmax.maximum,
            _scale(softmax),
            factors.ratio,
            factors.background,
            factors.background * factors.slope_sum - factors.at_columns.sum(dim=0),
            *factors.columns,
            *(factors.at_columns * factors.is_here),
        )
        _gradient_kernel[(logits.shape[0],)](
            logits,
            result,
            rows,
            _layout(logits, text, result),
            block=_block(logits.shape[1]),
            num_warps=_NUM_WARPS,
        )
    return result


def _rows(logits: Tensor) -> Tensor:
    logits = logits.detach()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _layout(logits: Tensor, text: TextShard, result: Tensor) -> _Layout:
    return _Layout(
        stride=logits.stride(0),
        result_stride=result.stride(0),
        width=logits.shape[1],
        num_columns=text.shard.num_columns,
        mask_column=-1 if text.mask_column is None else text.mask_column,
    )


def _block(num_columns: int) -> int:
    return int(min(_MAX_BLOCK, triton.next_power_of_2(max(1, num_columns))))


def _scale(softmax: Softmax) -> Tensor:
    """What exp(l - maximum) is multiplied by to be p; 0 where the rank has no mass."""
    return torch.where(softmax.exp_sum == 0, 0.0, softmax.share / softmax.exp_sum)


@triton.jit
def _is_text(columns, layout):
    return (columns < layout.num_columns) & (columns != layout.mask_column)


@triton.jit
def _load_text(row_start, columns, layout):
    """Logits in fp32, -inf for what is no text id of this rank."""
    is_text = _is_text(columns, layout)
    return tl.load(row_start + columns, mask=is_text, other=float("-inf")).to(tl.float32)


@triton.jit
def _mixture_terms(logits, maximum, scaled_ratio):
    """log(1 + y) and y / (1 + y) of y = r p, without losing the digits of a small y to the 1."""
    value = tl.exp(logits - maximum) * scaled_ratio
    plus_one = value + 1.0
    rounded = plus_one - 1.0
    quotient = value / tl.where(rounded == 0.0, 1.0, rounded)
    logarithm = tl.where(rounded == 0.0, value, tl.log(plus_one) * quotient)
    return logarithm, value / plus_one


@triton.jit
def _row_sums(row_start, maximum, scaled_ratio, layout, block: tl.constexpr):
    """Σ log(1 + r p_v) and Σ r p_v / (1 + r p_v) of one row."""
    logarithms = tl.zeros([block], tl.float32)
    slopes = tl.zeros([block], tl.float32)
    for start in range(0, layout.num_columns, block):
        values = _load_text(row_start, start + tl.arange(0, block), layout)
        logarithm, slope = _mixture_terms(values, maximum, scaled_ratio)
        logarithms += logarithm
        slopes += slope
    return tl.sum(logarithms, 0), tl.sum(slopes, 0)


@triton.jit
def _normalize_kernel(logits, rows, layout, has_ratio: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * layout.stride
    highest = tl.full([block], float("-inf"), tl.float32)
    mass = tl.zeros([block], tl.float32)
    for start in range(0, layout.num_columns, block):
        values = _load_text(row_start, start + tl.arange(0, block), layout)
        higher = tl.maximum(highest, values)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(highest - finite) + tl.exp(values - finite)
        highest = higher
    top = tl.maximum(tl.max(highest, 0), -3.4028234663852886e38)
    total = tl.sum(mass * tl.exp(highest - top), 0)
    tl.store(rows.maximum + row, top)
    tl.store(rows.exp_sum + row, total)
    if has_ratio:
        ratio = tl.load(rows.ratio + row)
        if ratio > 0.0:
            log_sum, slope_sum = _row_sums(row_start, top, ratio / total, layout, block)
            tl.store(rows.log_sum + row, log_sum)
            tl.store(rows.slope_sum + row, slope_sum)


@triton.jit
def _sums_kernel(logits, rows, layout, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ratio = tl.load(rows.ratio + row)
    if ratio > 0.0:
        maximum = tl.load(rows.maximum + row)
        row_start = logits + row * layout.stride
        log_sum, slope_sum = _row_sums(row_start, maximum, ratio, layout, block)
        tl.store(rows.log_sum + row, log_sum)
        tl.store(rows.slope_sum + row, slope_sum)


@triton.jit
def _gradient_kernel(logits, result, rows, layout, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * layout.stride
    result_start = result + row * layout.result_stride
    maximum, scale = tl.load(rows.maximum + row), tl.load(rows.scale + row)
    ratio, background = tl.load(rows.ratio + row), tl.load(rows.background + row)
    pull = tl.load(rows.pull + row)
    first, at_first = tl.load(rows.first + row), tl.load(rows.at_first + row)
    second, at_second = tl.load(rows.second + row), tl.load(rows.at_second + row)
    for start in range(0, layout.width, block):
        columns = start + tl.arange(0, block)
        probabilities = tl.exp(_load_text(row_start, columns, layout) - maximum) * scale
        scaled = probabilities * ratio
        gradients = probabilities * pull - background * (scaled / (scaled + 1.0))
        gradients += tl.where(columns == first, at_first, 0.0)
        gradients += tl.where(columns == second, at_second, 0.0)
        gradients = tl.where(_is_text(columns, layout), gradients, 0.0)
        is_column = columns < layout.width
        tl.store(result_start + columns, gradients.to(result.dtype.element_ty), mask=is_column)
