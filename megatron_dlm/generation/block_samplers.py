"""Sampler of block diffusion. Needs PyTorch, samplers.py and masked_samplers.py, nothing else.

Blocks come from left to right, each filled as masked diffusion fills a text. A block sees those
before it and never those behind, so that the keys and values of a finished block hold for ever: the
cache is exact. Exported models carry a copy of this file.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.generation.masked_samplers import (
    REVERSE_PROCESS,
    MaskedDecoding,
    Plan,
    fill_masks,
)
from megatron_dlm.generation.samplers import (
    PLAIN_CHOICE,
    Canvas,
    Denoiser,
    Samples,
    TokenChoice,
    Watch,
)


@torch.no_grad()
def sample_block(
    denoiser: Denoiser,
    prompt: Tensor,
    *,
    mask_id: int,
    block_size: int,
    num_tokens: int = 0,
    decoding: MaskedDecoding = REVERSE_PROCESS,
    choice: TokenChoice = PLAIN_CHOICE,
    valid: Tensor | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    watch: Watch | None = None,
) -> Samples:
    """Put `num_tokens` masks behind `prompt` (int64 [b, P]), then fill all masks, block by block.

    block_size: that of the model. Blocks are counted from the first real token of a row, so that
    the first one to fill may begin with tokens of the prompt. decoding: order, threshold and
    num_steps, which every block shares by its masks (at least one step each); cache `exact` keeps
    what finished blocks have computed, `none` computes it again, with the same result. A mask in
    the middle of a prompt sees what follows inside its block only. All else is as in
    `sample_masked`. ValueError for what has no meaning here: guidance, the caches that are
    approximate, and another block size.
    """
    _check(decoding, block_size)
    choice = replace(choice, forbidden_ids=(*choice.forbidden_ids, mask_id))
    canvas = Canvas(prompt, num_tokens, filler=mask_id, valid=valid, row_ids=row_ids)
    is_new = (canvas.tokens == mask_id) & canvas.is_real
    block = canvas.positions.clamp(min=0) // block_size
    first = block.gather(1, is_new.int().argmax(1, keepdim=True))
    block_of = (block - first).masked_fill(~is_new, -1)
    padding = (~canvas.is_real).sum(1, keepdim=True)
    reader = _BlockReader(denoiser, canvas, padding + first * block_size, block_size)
    reader.keeps_keys = decoding.cache == "exact"
    return fill_masks(
        canvas,
        Plan(block_of, _shares(block_of, decoding.num_steps)),
        reader,
        mask_id=mask_id,
        decoding=decoding,
        choice=choice,
        eos_id=eos_id,
        seed=seed,
        watch=watch,
    )


def _check(decoding: MaskedDecoding, block_size: int) -> None:
    if decoding.block_size not in (None, block_size):
        raise ValueError(
            f"block_size is {decoding.block_size}; the model was trained on blocks of "
            f"{block_size}: leave it out"
        )
    if decoding.guidance:
        raise ValueError(
            f"guidance is {decoding.guidance}; block diffusion never saw a masked prompt: set it "
            "to 0"
        )
    if decoding.cache not in ("exact", "none"):
        raise ValueError(f"cache is {decoding.cache}; block diffusion has exact and none")


def _shares(block_of: Tensor, num_steps: int | None) -> Tensor | None:
    """Steps of every block, by its part of the row's masks: int64 [b, K]."""
    if num_steps is None:
        return None
    blocks = torch.arange(int(block_of.max()) + 1, device=block_of.device)
    until = (block_of[:, :, None] <= blocks) & (block_of[:, :, None] >= 0)
    num_until = until.sum(1)
    steps_until = num_until * num_steps // num_until[:, -1:].clamp(min=1)
    return steps_until.diff(dim=1, prepend=torch.zeros_like(steps_until[:, :1])).clamp(min=1)


class _BlockReader:
    """Logits of the open block of every row."""

    cost = 1
    keeps_keys = True

    def __init__(self, denoiser: Denoiser, canvas: Canvas, starts: Tensor, block_size: int) -> None:
        """starts: int64 [b, 1], the slot where the first block to fill begins."""
        self._denoiser, self._valid = denoiser, canvas.valid
        self._starts, self._block_size = starts, block_size
        self._slots, self._length = canvas.slots, len(canvas.slots)
        self._cache: object | None = None
        self._num_unwritten = 0  # blocks left of the open one whose keys are not those of the end

    def open_block(self, block: int) -> None:
        stops = self._starts + (block + 1) * self._block_size
        self._stops = stops.clamp(max=self._length)
        self._num_unwritten += block > 0

    def logits(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        slots = self._window(tokens)
        chosen = tokens.gather(1, slots), wanted.gather(1, slots)
        if not self.keeps_keys:
            seen = None if self._valid is None else self._valid[:, : slots.shape[1]]
            return self._denoiser(chosen[0], valid=seen, wanted=chosen[1])
        return self._denoiser(
            chosen[0], valid=self._valid, slots=slots, cache=self._cache, wanted=chosen[1]
        )

    def _window(self, tokens: Tensor) -> Tensor:
        """Slots to compute, int64 [b, s]: the open block and what is not yet in the cache.

        Blocks that are computed without need come out as they were.
        """
        if not self.keeps_keys or self._cache is None:
            width = int(self._stops.max())
            if self.keeps_keys:
                self._cache = self._denoiser.new_cache(*tokens.shape)
            starts = torch.zeros_like(self._stops)
        else:
            width = min(self._length, (1 + self._num_unwritten) * self._block_size)
            starts = (self._stops - width).clamp(min=0)
        self._num_unwritten = 0
        return starts + self._slots[:width]
