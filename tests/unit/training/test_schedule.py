"""The learning rate against closed forms written out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megatron_dlm.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_dlm.training.schedule import learning_rate

PEAK, RATIO, TOTAL, WARMUP = 4e-4, 0.1, 1000, 100
MINIMUM = PEAK * RATIO
DECAYS = ["exponential", "linear", "one_minus_sqrt", "cosine"]


def rates(**schedule) -> list[float]:
    """Rates of steps 1..TOTAL; rates()[k - 1] belongs to step k."""
    config = ScheduleConfig(min_lr_ratio=RATIO, **{"warmup_steps": WARMUP, **schedule})
    return [learning_rate(k, TOTAL, OptimizerConfig(lr=PEAK), config) for k in range(1, TOTAL + 1)]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_warmup_is_a_line_from_zero_to_the_peak(kind):
    curve = rates(kind=kind)
    assert curve[:WARMUP] == pytest.approx([PEAK * k / WARMUP for k in range(1, WARMUP + 1)])
    assert curve[WARMUP - 1] == PEAK


def test_constant_never_falls():
    assert set(rates(kind="constant", warmup_steps=0)) == {PEAK}


@pytest.mark.parametrize(
    ("kind", "halfway"), [("cosine", (PEAK + MINIMUM) / 2), ("linear", (PEAK + MINIMUM) / 2)]
)
def test_decay_ends_at_the_minimum(kind, halfway):
    curve = rates(kind=kind)
    assert curve[-1] == pytest.approx(MINIMUM)
    assert curve[549] == pytest.approx(halfway)  # step 550 is halfway from 100 to 1000
    assert all(later < earlier for earlier, later in pairwise(curve[99:]))


def test_cosine_quarter_point():
    expected = MINIMUM + (PEAK - MINIMUM) * (1 + math.cos(math.pi / 4)) / 2
    assert rates(kind="cosine")[324] == pytest.approx(expected)  # 100 + 900 / 4


@pytest.mark.parametrize("decay_kind", DECAYS)
def test_wsd_is_flat_then_falls_to_the_minimum_without_a_jump(decay_kind):
    curve = rates(kind="wsd", decay_kind=decay_kind, decay_fraction=0.2)
    assert set(curve[WARMUP - 1 : 800]) == {PEAK}
    tail = curve[799:]
    assert all(later < earlier for earlier, later in pairwise(tail))
    assert tail[-1] == pytest.approx(MINIMUM)
    # Continuous where the decay starts: the steepest start, 1 - sqrt(r), falls by sqrt(1 / 200).
    assert tail[0] - tail[1] <= (PEAK - MINIMUM) * math.sqrt(1 / 200) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("decay_kind", "coefficient"),
    [
        ("exponential", 2 * 0.5**0.25 - 1),
        ("linear", 0.75),
        ("one_minus_sqrt", 0.5),
        ("cosine", 0.5 + math.sqrt(2) / 4),
    ],
)
def test_wsd_a_quarter_into_the_decay(decay_kind, coefficient):
    curve = rates(kind="wsd", decay_kind=decay_kind, decay_fraction=0.2)
    assert curve[849] == pytest.approx(MINIMUM + coefficient * (PEAK - MINIMUM))


def test_wsd_decay_never_reaches_into_the_warmup():
    curve = rates(kind="wsd", decay_fraction=1.0)
    assert curve[WARMUP - 1] == PEAK
    assert curve[WARMUP] < PEAK


def test_wsd_without_decay_stays_at_the_peak():
    assert rates(kind="wsd", decay_fraction=0.0)[-1] == PEAK


def test_warmup_constant_cooldown_to_zero():
    """The schedule of the GIDD runs: peak * (1 - sqrt(progress)) over the last fifth."""
    schedule = ScheduleConfig(
        kind="wsd",
        warmup_steps=WARMUP,
        min_lr_ratio=0.0,
        decay_fraction=0.2,
        decay_kind="one_minus_sqrt",
    )
    optimizer = OptimizerConfig(lr=PEAK)
    curve = [learning_rate(k, TOTAL, optimizer, schedule) for k in range(1, TOTAL + 1)]
    assert set(curve[WARMUP - 1 : 800]) == {PEAK}
    cooldown = [PEAK * (1 - math.sqrt((k - 800) / 200)) for k in range(801, TOTAL + 1)]
    assert curve[800:] == pytest.approx(cooldown, abs=1e-18)
    assert curve[-1] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_steps_beyond_the_end_keep_the_minimum(kind):
    schedule = ScheduleConfig(kind=kind, warmup_steps=WARMUP, min_lr_ratio=RATIO)
    beyond = learning_rate(TOTAL + 7, TOTAL, OptimizerConfig(lr=PEAK), schedule)
    assert beyond == pytest.approx(MINIMUM)


def test_run_of_warmup_only():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10)
    assert learning_rate(10, 10, OptimizerConfig(lr=PEAK), schedule) == PEAK
