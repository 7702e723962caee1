"""Best batch sizes and learning rates of grids whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.scaling.power_law import PowerLaw
from megatron_dlm.scaling.published import BATCH_TOKENS, LEARNING_RATE
from megatron_dlm.scaling.tuned_laws import (
    GridRun,
    fit_batch_law,
    fit_learning_rate_law,
    loss_levels,
    reached,
)

BATCHES = tuple(2.0**power for power in range(14, 22))


def run(
    batch: float, rate: float, *, setting: str = "1e8", score: float = 3.0, name: str = ""
) -> GridRun:
    name = name or f"{setting} {batch} {rate}"
    tokens = np.geomspace(1e8, 1e10, 30)
    return GridRun(name, setting, batch, rate, score, tokens, 5 - 0.1 * np.log(tokens))


def rates_grid(noise: float) -> list[GridRun]:
    """Scores with their lowest point at the published rate, the parabola of each batch its own."""
    random = np.random.default_rng(1)
    found = []
    for place, batch in enumerate(BATCHES):
        for factor in (0.3, 0.5, 1.0, 2.0, 4.0):
            rate = LEARNING_RATE(2.0**17) * (batch / 2**17) ** 0.3 * factor
            gap = np.log(rate / LEARNING_RATE(batch))
            score = 3 - 0.02 * place + 0.04 * gap**2 + random.normal(0, noise)
            found.append(run(batch, rate, score=score))
    return found


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.003, 0.03)])
def test_the_published_learning_rates_come_back(noise: float, tolerance: float) -> None:
    found = fit_learning_rate_law(rates_grid(noise))
    assert found.law.exponent == pytest.approx(LEARNING_RATE.exponent, abs=tolerance)
    assert found.law(2.0**17) == pytest.approx(LEARNING_RATE(2.0**17), rel=max(10 * noise, 1e-5))
    assert found.exponent.low - 1e-6 <= LEARNING_RATE.exponent <= found.exponent.high + 1e-6
    assert len(found.points) == len(BATCHES)


def test_a_batch_whose_best_rate_was_not_tried_is_left_out() -> None:
    runs = [each for each in rates_grid(0.0) if each.batch_tokens > BATCHES[0]]
    for rate in (0.001, 0.002, 0.003, 0.004):
        runs.append(run(BATCHES[0], rate, score=3 - np.log(rate) / 100 + 0.001 * rate**2))
    found = fit_learning_rate_law(runs)
    assert found.law.exponent == pytest.approx(LEARNING_RATE.exponent, abs=1e-6)
    (left_out,) = found.left_out
    assert left_out.startswith("batch 1.638e+04 tokens of 1e8: the ")
    with pytest.raises(ValueError, match=r"1 groups of runs have a best setting; a law needs two"):
        fit_learning_rate_law([each for each in runs if each.batch_tokens <= BATCHES[1]])


def batch_grid(noise: float) -> list[GridRun]:
    """A batch off the best of its tokens needs more of them; one of two rates wastes a third."""
    random = np.random.default_rng(2)
    found = []
    for scale in (0.3, 3.0):
        for batch in (2.0**power for power in range(12, 22)):
            for rate, waste in ((0.3, 1.0), (1.0, 1.3)):
                seen = scale * np.geomspace(1e8, 3e10, 80)
                # Tokens as the best batch would have needed for the same loss.
                gaps = 0.03 * np.log(batch / np.array([BATCH_TOKENS(t) for t in seen])) ** 2
                worth = seen / waste * np.exp(-gaps + random.normal(0, noise))
                losses = 2 + (worth / scale / 1e8) ** -0.2
                name = f"{scale} {batch} {rate}"
                found.append(GridRun(name, f"{scale}", batch, rate, losses[-1], seen, losses))
    return found


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.06), (0.02, 0.09)])
def test_the_published_batch_sizes_come_back(noise: float, tolerance: float) -> None:
    """Nearly: the tokens of a loss move with the batch, so its parabola leans."""
    found = fit_batch_law(batch_grid(noise))
    assert found.law.exponent == pytest.approx(BATCH_TOKENS.exponent, abs=tolerance)
    assert found.law(3e9) == pytest.approx(BATCH_TOKENS(3e9), rel=0.25)
    assert found.exponent.low < found.law.exponent < found.exponent.high
    assert len(found.points) >= 6


def test_levels_and_runs_that_do_not_reach_them() -> None:
    runs = [run(batch, 0.1) for batch in BATCHES[:5]]
    falls = (0.0, 0.1, 0.2, 0.3, 0.4)
    runs = [
        replace(each, loss_nats=np.linspace(4 - fall / 4, 3 - fall, 30))
        for each, fall in zip(runs, falls, strict=True)
    ]
    levels = loss_levels(runs, 3)
    # Four of the five sizes reach 2.9, and the one that begins lowest begins at 3.9.
    assert levels[-1] == pytest.approx(2.9)
    assert levels[0] < 3.9
    assert levels == sorted(levels, reverse=True)
    assert len(reached(runs, levels[-1])) == 4
    assert loss_levels(runs[:2], 3) == []


def test_a_loss_that_one_seed_misses_is_reached_by_no_rate() -> None:
    """Of each rate one seed goes lower: what both reach is 3.3 at best, whatever comes first."""
    tokens = np.array([1e8, 1e9, 1e10])

    def ends_at(rate: float, seed: int, end: float) -> GridRun:
        losses = np.array([5.0, 4.5, end])
        return GridRun(f"lr{rate} s{seed}", "", 100.0, rate, end, tokens, losses)

    high = [ends_at(1, 1, 3.29), ends_at(1, 2, 4.5)]
    low = [ends_at(2, 1, 3.0), ends_at(2, 2, 3.4)]
    for runs in ([*high, *low], [*low, *high]):
        assert reached(runs, 3.323) == []
        assert [each.run for each, _ in reached(runs, 3.45)] == ["lr2 s1", "lr2 s2"]
    # Four batch sizes with these runs: their levels are those that all seeds of a rate reach.
    grid = [
        replace(each, batch_tokens=each.batch_tokens * 2.0**place)
        for place in range(4)
        for each in [*high, *low]
    ]
    levels = loss_levels(grid, 3)
    assert levels[-1] == pytest.approx(3.4)
    assert len({each.batch_tokens for each, _ in reached(grid, levels[-1])}) == 4


def test_runs_that_end_early_are_named_and_not_compared() -> None:
    """The two higher rates stopped at 0.55 of the tokens, with the losses that they had there."""
    truth = PowerLaw(1e-3, 0.35)
    runs: list[GridRun] = []
    for batch in BATCHES[:4]:
        for factor in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
            tokens = np.geomspace(1e8, 1e10, 40)[: 22 if factor > 1.5 else 40]
            losses = 3 + 0.05 * np.log(factor) ** 2 - 0.1 * np.log(tokens / 1e10)
            rate = truth(batch) * factor
            name = f"b{batch:.0f}_f{factor}"
            runs.append(GridRun(name, "", batch, rate, float(losses[-1]), tokens, losses))
    found = fit_learning_rate_law(runs)
    assert found.law.exponent == pytest.approx(0.35, abs=1e-6)
    assert found.law.coefficient == pytest.approx(1e-3, rel=1e-4)
    assert found.left_out[0] == (
        "batch 1.638e+04 tokens: b16384_f2.0 at 1.19e+09, b16384_f2.8 at 1.19e+09 of 1e+10 tokens, "
        "too short to compare"
    )
    assert len(found.left_out) == 4


def test_a_grid_without_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all runs have batches of 1\.638e\+04 tokens"):
        fit_learning_rate_law([each for each in rates_grid(0.0) if each.batch_tokens < 2e4])
    with pytest.raises(ValueError, match="no loss is reached by runs of three batch sizes"):
        fit_batch_law([each for each in batch_grid(0.0) if 4e4 < each.batch_tokens < 1.4e5])


def test_three_batch_sizes_judge_no_parabola() -> None:
    with pytest.raises(ValueError, match=r"0 groups .* loss .*: 3 runs at 3 settings leave"):
        fit_batch_law([each for each in batch_grid(0.0) if 4e4 < each.batch_tokens < 3e5])


def test_tokens_to_a_loss() -> None:
    tokens, losses = np.array([1e8, 1e9, 1e10]), np.array([4.0, 3.0, 2.0])
    slow, quick, never = (
        GridRun(name, "", 100.0, rate, 2.0, tokens * factor, losses + lift)
        for name, rate, factor, lift in (("a", 0.1, 2, 0), ("b", 0.2, 1, 0), ("c", 0.3, 0.1, 2))
    )
    ((chosen, found),) = reached([slow, quick, never], 2.5)
    assert chosen.run == "b"
    assert found == pytest.approx(10**9.5)


def test_seeds_of_the_best_rate_all_count() -> None:
    tokens, losses = np.array([1e8, 1e9, 1e10]), np.array([4.0, 3.0, 2.0])
    runs = [
        GridRun(f"{rate} {seed}", "", 100.0, rate, 2.0, tokens * factor, losses)
        for rate, factors in ((0.1, (1.0, 1.2)), (0.2, (0.9, 2.0)))
        for seed, factor in enumerate(factors)
    ]
    assert [each.run for each, _ in reached(runs, 2.5)] == ["0.1 0", "0.1 1"]
