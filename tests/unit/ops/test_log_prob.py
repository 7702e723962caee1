"""log_prob on one rank against float64 log-softmax: values, gradients, padding, extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dlm.ops import vocab_parallel
from megatron_dlm.ops.vocab_parallel import log_prob


def reference(logits: Tensor, targets: Tensor, weights: Tensor, vocab_size: int):
    """Value and gradient of sum(weights * log_prob) in float64 over the real columns."""
    exact = logits.detach().double().requires_grad_()
    value = exact[:, :vocab_size].log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (value * weights.double()).sum().backward()
    return value.detach(), exact.grad


def ours(logits: Tensor, targets: Tensor, weights: Tensor, vocab_size: int):
    leaf = logits.detach().clone().requires_grad_()
    value = log_prob(leaf, targets, vocab_size=vocab_size, tp_group=None)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad


def example(num_rows: int, width: int, vocab_size: int, scale: float = 3.0):
    generator = torch.Generator().manual_seed(num_rows + width)
    logits = torch.randn(num_rows, width, generator=generator) * scale
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    weights = torch.randn(num_rows, generator=generator)
    return logits, targets, weights


@pytest.mark.parametrize(
    ("num_rows", "width", "vocab_size"),
    [(1, 1, 1), (7, 5, 5), (33, 64, 50), (5, 128, 1), (3, 70_000, 69_999), (700, 500, 300)],
)
def test_value_and_gradient(num_rows: int, width: int, vocab_size: int) -> None:
    logits, targets, weights = example(num_rows, width, vocab_size)
    value, gradient = ours(logits, targets, weights, vocab_size)
    exact_value, exact_gradient = reference(logits, targets, weights, vocab_size)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-6, atol=1e-7)
    assert torch.all(gradient[:, vocab_size:] == 0)


def test_gradient_by_finite_differences() -> None:
    """Against the float32 function itself, with steps far above its rounding error."""
    logits, targets, weights = example(4, 9, 7, scale=1.0)
    _, gradient = ours(logits, targets, weights, 7)
    step = 1e-2
    for row, column in [(0, 0), (1, 6), (2, int(targets[2])), (3, 8)]:
        shift = torch.zeros_like(logits)
        shift[row, column] = step
        above, below = (
            (log_prob(logits + sign * shift, targets, vocab_size=7, tp_group=None) * weights).sum()
            for sign in (1, -1)
        )
        difference = ((above - below) / (2 * step)).item()
        assert difference == pytest.approx(gradient[row, column].item(), abs=2e-4)


@pytest.mark.parametrize("size", [1e4, -1e4, 3e38])
def test_extreme_logits(size: float) -> None:
    """One huge logit, a common huge offset, and values at the end of the fp32 range."""
    base, targets, weights = example(6, 12, 10)
    for logits in (base.clone(), base + size if abs(size) < 1e5 else base.clone()):
        logits[:, 3] = size
        value, gradient = ours(logits, targets, weights, 10)
        exact_value, exact_gradient = reference(logits, targets, weights, 10)
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


def test_minus_infinity_removes_a_token_and_nan_shows() -> None:
    logits, targets, weights = example(3, 8, 8)
    targets = torch.tensor([1, 2, 3])
    logits[:, 5] = -torch.inf
    value, gradient = ours(logits, targets, weights, 8)
    exact_value, _ = reference(logits, targets, weights, 8)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-6)
    assert torch.all(gradient[:, 5] == 0)
    logits[1, 0] = torch.nan
    value, _ = ours(logits, targets, weights, 8)
    assert value.isnan().tolist() == [False, True, False]


def test_padding_columns_may_hold_anything() -> None:
    logits, targets, weights = example(9, 16, 11)
    expected_value, expected_gradient = ours(logits, targets, weights, 11)
    for filler in (1e6, torch.inf, torch.nan):
        logits[:, 11:] = filler
        value, gradient = ours(logits, targets, weights, 11)
        assert torch.equal(value, expected_value)
        assert torch.equal(gradient, expected_gradient)


def test_a_target_that_is_no_token_is_loud() -> None:
    logits, _, _ = example(3, 8, 6)
    value = log_prob(logits, torch.tensor([-1, 6, 5]), vocab_size=6, tp_group=None)
    assert value.isinf().tolist() == [True, True, False]


def test_bf16_logits() -> None:
    """The result is that of the bf16 numbers taken exactly; the gradient is rounded once."""
    logits, targets, weights = example(50, 300, 290)
    logits[:10, 7], targets[:10] = 20.0, 7  # nearly certain: 1 - p must not be lost
    rounded = logits.to(torch.bfloat16)
    value, gradient = ours(rounded, targets, weights, 290)
    exact_value, exact_gradient = reference(rounded, targets, weights, 290)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-6)


def test_float64_logits() -> None:
    logits, targets, weights = example(20, 30, 30)
    value, gradient = ours(logits.double(), targets, weights, 30)
    exact_value, exact_gradient = reference(logits, targets, weights, 30)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-5, atol=1e-6)


def test_no_rows() -> None:
    leaf = torch.zeros(0, 16, requires_grad=True)
    value = log_prob(leaf, torch.zeros(0, dtype=torch.int64), vocab_size=11, tp_group=None)
    assert value.shape == (0,)
    value.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 16)


def test_logits_are_untouched_and_backward_may_run_twice() -> None:
    logits, targets, weights = example(12, 40, 33)
    leaf = logits.clone().requires_grad_()
    value = (log_prob(leaf, targets, vocab_size=33, tp_group=None) * weights).sum()
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(value, leaf)
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), logits)


def test_chunks_and_strides_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, weights = example(37, 50, 45)
    expected = ours(logits, targets, weights, 45)
    strided = logits.t().contiguous().t()
    for budget in (1, 100, 45 * 7):
        monkeypatch.setattr(vocab_parallel, "_CPU_CHUNK_ELEMENTS", budget)
        for layout in (logits, strided):
            value, gradient = ours(layout, targets, weights, 45)
            torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-7)


def test_nothing_of_the_size_of_the_logits_is_saved() -> None:
    logits, targets, _ = example(64, 512, 500)
    leaf = logits.requires_grad_()
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        log_prob(leaf, targets, vocab_size=500, tp_group=None)
    large = [tensor for tensor in saved if tensor.numel() >= 64 * 100]
    assert [tensor.data_ptr() for tensor in large] == [leaf.data_ptr()]
