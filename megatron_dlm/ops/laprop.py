"""LaProp: Adam with the division by the second moment before the momentum instead of after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers updated together. On CPU the eight passes over them stay inside the cache of a core; on a
# GPU the one temporary copy stays at 256 MB.
_BATCH = {"cpu": 1 << 17, "cuda": 1 << 26}

Tensors = list[Tensor]


class LaProp(torch.optim.Optimizer):
    """Update number k = 1, 2, ... of a parameter θ with gradient g, state v and m in fp32:

        v <- b2' v + (1 - b2') g²
        m <- b1' m + (1 - b1') g / (sqrt(v) + eps)
        θ <- θ - lr (m + weight_decay θ)         with b' = 1 - (1 - b) / (1 - b^k)

    The changing b' make v and m means over the steps so far, so nothing is corrected afterwards.
    The state has torch AdamW's names, so a checkpoint holds both in the same form. All parameters
    are updated at every step. Source: arXiv 2002.04839, with the debiasing of "Scaling Behavior of
    Discrete Diffusion Language Models".
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        """defaults: lr, betas, eps and weight_decay of groups that do not bring their own."""
        super().__init__(params, defaults)

    @classmethod
    def taking_over(cls, other: torch.optim.Optimizer) -> LaProp:
        """LaProp of the groups of an optimizer that has not made a step."""
        assert not other.state, "the other optimizer has begun"
        optimizer = cls([{"params": []}])
        optimizer.param_groups = other.param_groups
        return optimizer

    @staticmethod
    def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step; the counter stays on the host, where it is read."""
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        assert closure is None, "the gradients are ready"
        for group in self.param_groups:
            if group["params"]:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters: Tensors = group["params"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.fresh_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        number = int(states[0]["step"])
        beta1, beta2 = (1 - (1 - beta) / (1 - beta**number) for beta in group["betas"])
        everything = (
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )
        for values, gradients, momenta, squares in _batches(*everything):
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            directions = torch._foreach_sqrt(squares)
            torch._foreach_add_(directions, group["eps"])
            torch._foreach_mul_(momenta, beta1)
            torch._foreach_addcdiv_(momenta, gradients, directions, 1 - beta1)
            if group["weight_decay"]:
                torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(values, momenta, alpha=-group["lr"])


def _batches(*tensors: Tensors) -> Iterator[list[Tensors]]:
    """The same pieces of all lists, about _BATCH numbers at a time."""
    limit = _BATCH[tensors[0][0].device.type]
    batch: list[Tensors] = [[] for _ in tensors]
    size = 0
    for together in zip(*tensors, strict=True):
        for pieces in zip(*(_pieces(tensor, limit) for tensor in together), strict=True):
            for collected, piece in zip(batch, pieces, strict=True):
                collected.append(piece)
            size += pieces[0].numel()
            if size >= limit:
                yield batch
                batch, size = [[] for _ in tensors], 0
    if size:
        yield batch


def _pieces(tensor: Tensor, limit: int) -> Sequence[Tensor]:
    return (tensor,) if tensor.numel() <= limit else torch.split(tensor.view(-1), limit)
