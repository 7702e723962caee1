"""Which slots see which, and where their keys and values are kept.

Shapes: b rows, s slots of the input, L slots that are seen (those of a cache, else s), d width of a
head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of `num_slots` slots, each written and rewritten at its place.

    One buffer serves appending (autoregressive decoding) and rewriting the block that is being
    denoised while what lies left (and right) of it stays.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.filled: Tensor | None = None
        """bool [b, L]: slots that hold a real token, the only ones that attention may see."""
        self._num_used = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def mark(self, slots: Tensor, real: Tensor) -> Tensor:
        """Note what is about to be written at slots [b, s]; returns `filled` up to the last."""
        if self.filled is None:
            self.filled = real.new_zeros(len(real), self.num_slots)
        self.filled.scatter_(1, slots, real)
        self._num_used = max(self._num_used, int(slots.max()) + 1)
        return self.filled[:, : self._num_used]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [b, heads, s, d] at slots [b, s]; returns all slots up to the last, [.., L, d]."""
        if layer not in self._layers:
            rows, heads, _, width = key.shape
            empty = key.new_zeros(rows, heads, self.num_slots, width)
            self._layers[layer] = (empty, empty.clone())
        place = slots[:, None, :, None].expand_as(key)
        for stored, new in zip(self._layers[layer], (key, value), strict=True):
            stored.scatter_(2, place, new)
        keys, values = self._layers[layer]
        return keys[:, :, : self._num_used], values[:, :, : self._num_used]


@dataclass(frozen=True)
class Visibility:
    """What attention is told, and experts."""

    mask: Tensor | None
    """bool [b, 1, s, L], True is seen; None where every slot is, or all up to the own one."""
    is_causal: bool = False
    """All up to the own one, where there is no mask."""
    cache: KeyValueCache | None = None
    slots: Tensor | None = None
    """int64 [b, s]: where keys and values are stored in the cache."""
    real: Tensor | None = None
    """bool [b, s]: not padding; None where nothing is."""


@dataclass(frozen=True)
class Rule:
    """Who may see whom, by the pattern of the model.

    causal: a slot sees those up to itself. bidirectional: all. block: all of its own block of
    `block_size` real tokens and of the blocks before. In doubled input, [corrupted; clean] of twice
    the length, a corrupted slot sees the corrupted ones of its own block and the clean ones of the
    blocks before, a clean slot the clean ones of its block and before. On top of each: context
    slots do not see others.
    """

    pattern: str
    block_size: int
    wants_mask: bool
    """Write a mask even where is_causal would do."""

    def visibility(
        self,
        like: Tensor,
        *,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        cache: KeyValueCache | None = None,
        slots: Tensor | None = None,
        doubled: bool = False,
    ) -> tuple[Visibility, Tensor]:
        """For input `like` [b, s, ..]: what is seen, and positions [b, s], real tokens before.

        The arguments are those of `MegatronDLMForCausalLM`; raises ValueError where their shapes
        do not fit the input or doubled input does not fit the model.
        """
        rows, length = like.shape[:2]
        own = torch.arange(length, device=like.device).expand(rows, length)
        if doubled:
            self._check_doubled(length, cache)
        is_plain = cache is None and attention_mask is None and context is None
        if is_plain and self.pattern != "block":
            is_causal = self.pattern == "causal"
            if not (is_causal and self.wants_mask):
                return Visibility(None, is_causal=is_causal), own
        shape = (rows, length if cache is None else cache.num_slots)
        real = _flags("attention_mask", attention_mask, like, shape, default=True)
        count = real.unflatten(1, (2, -1)).cumsum(2).flatten(1) if doubled else real.cumsum(1)
        every = _Slots(
            torch.arange(shape[1], device=like.device).expand(shape),
            (count - 1).clamp(min=0),
            _flags("context", context, like, shape, default=False),
        )
        slots = own if slots is None else slots.to(like.device).expand(rows, length)
        query = every.at(slots)
        own_real = real.gather(1, slots)
        visible = real
        if cache is not None:
            visible = cache.mark(slots, own_real)
            visible = visible & real[:, : visible.shape[1]]
        key = every.at(every.place[:, : visible.shape[1]])
        mask = visible[:, None, :] & self._allowed(query, key, doubled=doubled)
        # Padding sees itself, or it would see nothing.
        mask = mask | (key.place[:, None, :] == query.place[:, :, None])
        # Where nothing is hidden the kernels are faster without a mask.
        told = None if bool(mask.all()) else mask[:, None]
        return Visibility(told, cache=cache, slots=slots, real=own_real), query.count

    def _check_doubled(self, length: int, cache: KeyValueCache | None) -> None:
        if self.pattern != "block" or cache is not None or length % 2:
            raise ValueError(
                f"doubled input of {length} slots for attn_mask_type {self.pattern}: only block "
                "models without a cache read a corrupted and a clean half of one length"
            )

    def _allowed(self, query: _Slots, key: _Slots, *, doubled: bool) -> Tensor:
        """bool [b, s, L], padding aside."""
        context = (query.is_context[:, :, None], key.is_context[:, None, :])
        allowed = ~context[0] | context[1]
        if self.pattern == "causal":
            return allowed & (key.place[:, None, :] <= query.place[:, :, None])
        if self.pattern == "bidirectional":
            return allowed
        own, other = (
            query.count[:, :, None] // self.block_size,
            key.count[:, None, :] // self.block_size,
        )
        if not doubled:
            return allowed & (other <= own)
        half = key.place.shape[1] // 2
        is_clean = (query.place[:, :, None] >= half, key.place[:, None, :] >= half)
        of_clean = is_clean[1] & ((other < own) | (is_clean[0] & (other == own)))
        return allowed & (of_clean | (~is_clean[0] & ~is_clean[1] & (other == own)))


@dataclass(frozen=True)
class _Slots:
    """Some slots of every row; fields are [b, n]."""

    place: Tensor
    """int64: where they lie."""
    count: Tensor
    """int64: real tokens before."""
    is_context: Tensor

    def at(self, slots: Tensor) -> _Slots:
        """Those at `slots` [b, m]."""
        chosen = (part.gather(1, slots) for part in (self.place, self.count, self.is_context))
        return _Slots(*chosen)


def _flags(
    name: str, flags: Tensor | None, like: Tensor, shape: tuple[int, int], *, default: bool
) -> Tensor:
    if flags is None:
        return torch.full(shape, default, device=like.device)
    if flags.shape != shape:
        raise ValueError(f"{name} has shape {list(flags.shape)}; it must be {list(shape)}")
    return flags.to(device=like.device, dtype=torch.bool)
