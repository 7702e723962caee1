"""The model as samplers see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .visibility import KeyValueCache

NO_CACHE = (
    "a part of a row cannot be computed alone: experts choose among all its tokens "
    "(moe_routing expert_choice); use no cache"
)


class Denoiser:
    """`denoiser(tokens)` -> logits, on the model's device and without gradients."""

    def __init__(self, model: Any) -> None:
        """model: a `MegatronDLMForCausalLM`."""
        self.model = model

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        slots: Tensor | None = None,
        cache: KeyValueCache | None = None,
        wanted: Tensor | None = None,
        context: Tensor | None = None,
        doubled: bool = False,
    ) -> Tensor:
        """int64 [b, s] -> [b, s, V], or [n, V] for the n slots of `wanted` (bool [b, s]) alone.

        valid: bool [b, s], with a cache [b, L]; the others as `MegatronDLMForCausalLM` takes them.
        """
        device = self.model.device
        hidden = self.model.model(
            tokens.to(device), valid, cache=cache, slots=slots, context=context, doubled=doubled
        ).last_hidden_state
        return self.model.logits(hidden if wanted is None else hidden[wanted.to(device)])

    def new_cache(self, batch_size: int, num_slots: int) -> KeyValueCache | None:
        """An empty cache, whose storage is made when it is first written; None where no part of a
        row can be computed alone."""
        del batch_size
        if self.model.config.routes_whole_rows:
            return None
        return KeyValueCache(num_slots)
