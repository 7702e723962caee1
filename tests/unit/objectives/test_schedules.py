"""Closed forms of the schedules, and the identities that make them schedules."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dlm.objectives.schedules import Schedule, build_schedule

CASES = [("linear", 2.0), ("cosine", 2.0), ("polynomial", 0.5), ("polynomial", 2.0)]
TIMES = torch.linspace(1e-3, 1.0, 1001, dtype=torch.float64)[:-1]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}", name="schedule")
def _schedule(request: pytest.FixtureRequest) -> Schedule:
    return build_schedule(*request.param)


def test_alpha_falls_from_one_to_zero(schedule: Schedule) -> None:
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.all(schedule.alpha(TIMES).diff() < 0)
    torch.testing.assert_close(
        schedule.mask_rate(TIMES), 1 - schedule.alpha(TIMES), rtol=0, atol=1e-15
    )


def test_weight_is_minus_the_derivative_of_alpha_over_the_mask_rate(schedule: Schedule) -> None:
    times = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.alpha(times).sum(), times)
    expected = -derivative / (1 - schedule.alpha(TIMES))
    torch.testing.assert_close(schedule.elbo_weight(TIMES), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("case", "alpha", "weight"),
    [
        (CASES[0], 0.75, 4.0),
        (CASES[1], 1 - math.cos(3 * math.pi / 8), math.pi / 2 * math.tan(3 * math.pi / 8)),
        (CASES[2], 0.5, 2.0),
        (CASES[3], 0.9375, 8.0),
    ],
)
def test_values_at_a_quarter(case: tuple[str, float], alpha: float, weight: float) -> None:
    time = torch.tensor(0.25, dtype=torch.float64)
    schedule = build_schedule(*case)
    assert schedule.alpha(time).item() == pytest.approx(alpha, rel=1e-14)
    assert schedule.elbo_weight(time).item() == pytest.approx(weight, rel=1e-14)
