"""Root mean squares of a model's activations, before and after some updates.

Import only after `open_device`: on CPU it has to adapt Megatron Core first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from size_trials import Trial
from torch import Tensor

_QUANTITIES = ("embedding", "attention", "mlp", "residual", "logits")


@dataclass(frozen=True)
class Sizes:
    """Root mean squares over all numbers, and over all layers where there are several."""

    start: float
    end: float
    change: float
    """Of the difference between end and start."""


def activation_sizes(trial: Trial, rate: float, num_steps: int) -> dict[str, Sizes]:
    """By name: attention and mlp are the outputs of all layers, residual the stream behind them."""
    starts = _activations(trial)
    for number in range(1, num_steps + 1):
        trial.step(number, rate)
    ends = _activations(trial)
    sizes = {}
    for name in _QUANTITIES:
        changes = [end - start for end, start in zip(ends[name], starts[name], strict=True)]
        sizes[name] = Sizes(_size(starts[name]), _size(ends[name]), _size(changes))
    return sizes


def _activations(trial: Trial) -> dict[str, list[Tensor]]:
    """Of batch 0, which is never trained on."""
    found: dict[str, list[Tensor]] = {name: [] for name in _QUANTITIES}
    with _recording(trial, found):
        found["logits"].append(trial.logits(0))
    found["residual"] = found["residual"][-1:]
    return found


@contextmanager
def _recording(trial: Trial, found: dict[str, list[Tensor]]) -> Iterator[None]:
    watched = [("embedding", trial.model.embedding)]
    for layer in trial.model.decoder.layers:
        watched += [("attention", layer.self_attention), ("mlp", layer.mlp), ("residual", layer)]
    hooks = [
        module.register_forward_hook(lambda *call, name=name: found[name].append(_output(call[-1])))
        for name, module in watched
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output(value: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """Megatron's modules keep a bias apart, which the next one adds."""
    output, bias = (value, None) if isinstance(value, Tensor) else value
    return (output if bias is None else output + bias).detach().float().clone()


def _size(tensors: list[Tensor]) -> float:
    squares = torch.stack([tensor.square().mean() for tensor in tensors])
    return float(squares.mean().sqrt())
