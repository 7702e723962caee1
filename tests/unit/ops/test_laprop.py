"""LaProp against a loop in float64, on CPU pieces of every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.ops import laprop
from megatron_dlm.ops.laprop import LaProp

NUM_STEPS = 7
LR, BETAS, EPSILON, DECAY = 0.03, (0.9, 0.98), 1e-6, 0.2


def reference(start: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float):
    """The ten lines of the paper, in float64."""
    value, momentum, square = start.astype(np.float64), 0.0, 0.0
    for k, gradient in enumerate(gradients, start=1):
        gradient = gradient.astype(np.float64)
        beta1, beta2 = (1 - (1 - beta) / (1 - beta**k) for beta in BETAS)
        square = beta2 * square + (1 - beta2) * gradient**2
        momentum = beta1 * momentum + (1 - beta1) * gradient / (np.sqrt(square) + EPSILON)
        value = value - lr * (momentum + decay * value)
    return value, momentum, square


def made_up(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [8, 64, 1 << 17])
def test_against_the_loop(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Two groups with settings of their own; tensors below, at and above the size of a piece."""
    monkeypatch.setitem(laprop._BATCH, "cpu", batch)
    shapes = [(5,), (64,), (1,), (7, 30)]
    starts = [made_up(shape, seed) for seed, shape in enumerate(shapes)]
    gradients = [
        [made_up(shape, 100 + 10 * k + seed) for k in range(NUM_STEPS)]
        for seed, shape in enumerate(shapes)
    ]
    gradients[0][0][:3] = 0.0  # as behind an output layer that starts at zero
    parameters = [torch.from_numpy(start.copy()).requires_grad_() for start in starts]
    settings = [(LR, 0.0), (LR / 4, DECAY)]
    optimizer = LaProp(
        [
            {"params": parameters[:2], "lr": LR, "weight_decay": 0.0},
            {"params": parameters[2:], "lr": LR / 4, "weight_decay": DECAY},
        ],
        betas=BETAS,
        eps=EPSILON,
    )
    for k in range(NUM_STEPS):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient[k].copy())
        optimizer.step()
    for number, parameter in enumerate(parameters):
        wanted = reference(starts[number], gradients[number], *settings[number // 2])
        state = optimizer.state[parameter]
        found = (parameter, state["exp_avg"], state["exp_avg_sq"])
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=2e-6, atol=2e-6)
        assert state["step"] == NUM_STEPS


def test_the_first_update_is_the_sign_of_the_gradient() -> None:
    """At k = 1 both betas are 0: nothing of the zeros that the state starts from is left."""
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([1e-3, -2.0, 0.0])
    LaProp([parameter], lr=0.5, betas=BETAS, eps=1e-12, weight_decay=0.0).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, 0.5, 0.0]))


def test_scale_of_the_loss_does_not_matter() -> None:
    ends = []
    for scale in (1.0, 1e4):
        parameter = torch.ones(50, requires_grad=True)
        optimizer = LaProp([parameter], lr=0.1, betas=BETAS, eps=1e-12, weight_decay=0.0)
        for k in range(5):
            parameter.grad = scale * torch.from_numpy(made_up((50,), k))
            optimizer.step()
        ends.append(parameter.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


def test_takes_over_the_groups_of_a_fresh_optimizer_only() -> None:
    parameter = torch.ones(4, requires_grad=True)
    adam = torch.optim.AdamW([parameter], lr=0.1, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    ours = LaProp.taking_over(adam)
    assert ours.param_groups is adam.param_groups
    parameter.grad = torch.full((4,), 3.0)
    ours.step()
    expected = 1 - 0.1 * (3 / (3 + EPSILON) + DECAY)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), expected))
    adam.step()
    with pytest.raises(AssertionError, match="has begun"):
        LaProp.taking_over(adam)
