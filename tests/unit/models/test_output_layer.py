"""chunked_loss on a plain layer: without gradients, with a frozen weight, its memory, its limits.

That it equals the whole layer on Megatron's own is shown in tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dlm.models.output_layer import chunked_loss
from megatron_dlm.ops.vocab_parallel import log_prob

NUM_ROWS, WIDTH, VOCAB_SIZE = 50, 8, 300


class Layer(nn.Module):
    """The calling convention of Megatron's ColumnParallelLinear."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(VOCAB_SIZE, WIDTH, generator=generator))

    def forward(self, rows: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return rows @ (self.weight if weight is None else weight).t(), None


def rows() -> Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def nll(logits: Tensor, place: slice) -> tuple[Tensor, Tensor]:
    targets = torch.arange(NUM_ROWS)[place]
    total = -log_prob(logits, targets, vocab_size=VOCAB_SIZE, tp_group=None).sum()
    return total, torch.stack((total.detach(), torch.tensor(float(len(targets)))))


@pytest.mark.parametrize("chunk_rows", [1, 7, NUM_ROWS, 1000])
def test_without_gradients(chunk_rows: int) -> None:
    layer, hidden = Layer(), rows().requires_grad_()
    with torch.no_grad():
        total, sums = chunked_loss(layer, hidden, None, nll, chunk_rows=chunk_rows)
        expected, _ = nll(layer(hidden)[0], slice(None))
    assert not total.requires_grad
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums, torch.stack((expected, torch.tensor(float(NUM_ROWS)))))


def test_frozen_weight_or_input() -> None:
    layer, hidden = Layer(), rows().requires_grad_()
    nll(layer(hidden)[0], slice(None))[0].backward()
    of_hidden, of_weight = hidden.grad, layer.weight.grad
    assert of_hidden is not None and of_weight is not None  # noqa: PT018

    layer.weight.grad = None
    chunked_loss(layer, rows(), None, nll, chunk_rows=7)[0].backward()
    torch.testing.assert_close(layer.weight.grad, of_weight)

    layer.weight.requires_grad_(False)
    hidden.grad = layer.weight.grad = None
    chunked_loss(layer, hidden, None, nll, chunk_rows=7)[0].backward()
    torch.testing.assert_close(hidden.grad, of_hidden)
    assert layer.weight.grad is None


def test_backward_runs_once() -> None:
    layer = Layer()
    total, _ = chunked_loss(layer, rows(), None, nll, chunk_rows=7)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        total.backward()


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_of_all_logits_is_made() -> None:
    layer, hidden = Layer(), rows().requires_grad_()
    with _LargestTensor() as largest:
        chunked_loss(layer, hidden, None, nll, chunk_rows=7)[0].backward()
    assert largest.elements == max(7, WIDTH) * VOCAB_SIZE
