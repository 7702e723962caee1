"""The bound of masked diffusion, of a whole answer or block by block, from sets of masks.

An answer, or a block, of l tokens has the any-order bound

    -log p(tokens | past)  <=  E_n E_S [ (l / n) * sum over S of -log p(token | the rest) ],

n uniform on 1..l, S a uniform set of n masked tokens. It is the count form of the training bound,
estimated as LLaDA does (arXiv 2502.09992): N sets, their sizes n spread evenly over 1..l. Where all
sets, 2^l - 1, are no more than N they are scored instead: the bound itself, at no greater cost.
A block of one token is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dlm.evaluation.estimates import (
    Drawn,
    MaskDraws,
    Request,
    by_length,
    request_key,
    stratified_levels,
)
from megatron_dlm.evaluation.reading import Row, SlotReader, read_rows
from megatron_dlm.objectives.masked import mask_by_count
from megatron_dlm.ops.counter_rng import Purpose, Stream, random_bits


class MaskBound:
    """How a model with masks reads a text.

    block_size: tokens of a block, counted from the beginning of the text, for block diffusion;
    None is masked diffusion, in which the whole answer is one block.
    """

    def __init__(self, mask_id: int, block_size: int | None = None) -> None:
        self.mask_id, self.block_size = mask_id, block_size

    def row(self, text: Tensor, masked: Tensor, targets: Tensor | None = None) -> Row:
        """The text (int64 [s]) with these masks (bool [s]), each asked about."""
        slots = masked.nonzero()[:, 0]
        hidden = text.masked_fill(masked, self.mask_id)
        clean = None if self.block_size is None else text
        return Row(hidden, slots, (text if targets is None else targets)[slots], clean=clean)

    def draw(self, request: Request, draws: MaskDraws) -> Drawn:
        """The inputs of one request."""
        text, scored = request.text, request.in_answer
        longest = int(self._blocks(scored).sum(1).max())
        if draws.enumerates(longest):
            masked, weights = self._every_set(scored, longest)
        else:
            masked, weights, _ = draw_sets(
                request_key(request),
                scored,
                num_samples=draws.num_samples,
                seed=draws.seed,
                block_size=self.block_size,
            )
        return Drawn(
            rows=[self.row(text, hidden) for hidden in masked],
            weights=[weight[hidden] for weight, hidden in zip(weights, masked, strict=True)],
            is_sum=draws.enumerates(longest),
        )

    def _blocks(self, scored: Tensor) -> Tensor:
        """bool [K, B] of bool [s]"""
        return in_blocks(scored[None], self.block_size)

    def _every_set(self, scored: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """All non-empty sets of every block, bool [m, s], and their shares of the bound.

        Each size is as probable as the others, as are the sets of one size. Row i holds set i of
        every block that has so many.
        """
        numbers = torch.arange(1, 2**longest)
        blocks = self._blocks(scored)
        place = (blocks.cumsum(1) - 1).clamp(min=0)  # of a scored token among those of its block
        num_scored = blocks.sum(1)
        masked = (numbers[:, None, None] >> place) % 2 == 1
        masked &= blocks & (numbers[:, None, None] < 2 ** num_scored[:, None])
        sizes = masked.sum(2)
        num_of_size = torch.tensor(
            [[math.comb(int(length), size) for size in range(longest + 1)] for length in num_scored]
        )
        of_row = num_of_size.T.gather(0, sizes).double()
        weights = 1.0 / (sizes.clamp(min=1).double() * of_row)
        shape = (len(numbers), -1)
        whole = masked.reshape(shape)[:, : len(scored)]
        return whole, weights[..., None].expand_as(masked).reshape(shape)[:, : len(scored)]

    def greedy(
        self, reader: SlotReader, requests: Sequence[Request], *, batch_size: int
    ) -> set[int]:
        """The requests whose answer greedy decoding writes: they leave at the first other token.

        Every step fills the mask, of the leftmost block that has any, whose likeliest token is the
        most probable; the first of equals.
        """
        order = by_length(requests)
        hidden = {number: requests[number].in_answer for number in order}
        greedy = set()
        while hidden:
            rows = [self._next(requests[number], masked) for number, masked in hidden.items()]
            answers = list(read_rows(reader, rows, batch_size))
            for number, (row, said) in zip(list(hidden), answers, strict=True):
                surest = int(said.likeliest_log_probs.argmax())
                if int(said.likeliest[surest]) != int(row.targets[surest]):
                    del hidden[number]
                    continue
                hidden[number][row.slots[surest]] = False
                if not bool(hidden[number].any()):
                    greedy.add(number)
                    del hidden[number]
        return greedy

    def _next(self, request: Request, hidden: Tensor) -> Row:
        """The row of the leftmost block with masks, or of all."""
        size = self.block_size or len(hidden)
        stop = (int(hidden.int().argmax()) // size + 1) * size
        return self.row(request.text[:stop], hidden[:stop])


def in_blocks(values: Tensor, block_size: int | None) -> Tensor:
    """[n * K, B] of [n, s], the last block filled up with zeros; K = 1 without a size."""
    size = block_size or values.shape[1]
    return pad(values, (0, -values.shape[1] % size)).reshape(-1, size)


def draw_sets(
    key: Tensor,
    valid: Tensor,
    *,
    num_samples: int,
    seed: int,
    offset: float | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sets of masked tokens among the valid ones (bool [s]), their sizes spread evenly.

    Of a block with l valid tokens set j of N has 1 + floor(l (u + j) / N), u uniform in [0, 1) and
    the same for all blocks: every size is as probable as the others, and the sets come in order of
    size. key: int64 [], names the text in the noise; `offset` takes the place of u. Returns masked
    bool [N, s], weights l / n float64 [N, s], and the share of masked tokens, float64 [N].
    """
    levels = stratified_levels(key, num_samples=num_samples, seed=seed, offset=offset)
    samples, slots = torch.arange(num_samples), torch.arange(len(valid))
    keys = random_bits(seed, Stream.LIKELIHOOD, Purpose.VALUE, key, samples)
    bits = random_bits(seed, Stream.LIKELIHOOD, Purpose.MASK, keys[:, None], slots[None])
    every = in_blocks(valid.expand(num_samples, -1), block_size)
    draws = levels.repeat_interleave(len(every) // num_samples)[:, None]
    found = mask_by_count(draws, in_blocks(bits, block_size), every)

    def whole(values: Tensor) -> Tensor:
        return values.expand_as(every).reshape(num_samples, -1)[:, : len(valid)]

    masked = whole(found.masked)
    shares = masked.sum(1) / valid.sum().clamp(min=1).double()
    return masked, whole(found.elbo_weight), shares
