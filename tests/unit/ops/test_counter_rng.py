"""The hash against Python integers, its statistics, and its purity under slicing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_dlm.ops.counter_rng import (
    Purpose,
    Stream,
    host_uniform,
    normal,
    random_bits,
    uniform,
)

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
DRAW = (1234, Stream.TRAINING, Purpose.MASK)
# Of seed 1234, index 0 and 1, position 0, 1, 2. A change here changes the noise of every run.
GOLDEN_BITS = [
    [2720464385173127542, -8139647841472919814, -6987927857511497773],
    [3500984235677221658, 1484177696691378158, -1803196562600532994],
]
GOLDEN_NORMALS = [[-1.86169, 1.0263716, 0.0243257], [-1.427809, -1.9900919, 0.1929102]]


def splitmix64(state: int) -> int:
    """One output of the reference generator whose counter stands at `state`."""
    word = (state + GOLDEN) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def reference_bits(*words: int) -> int:
    """Each word advances the splitmix64 state by that many steps and takes the output as state."""
    state = 0
    for word in words:
        state = splitmix64(state + word * GOLDEN)
    return state


def counters(num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(num_rows)[:, None], torch.arange(num_columns)[None, :]


def correlation_z(left: np.ndarray, right: np.ndarray) -> float:
    """Correlation of two uniform samples in standard errors."""
    return float(np.mean((left - 0.5) * (right - 0.5)) * 12 * np.sqrt(left.size))


def test_splitmix64_reference_gives_the_published_outputs() -> None:
    # First outputs of the public splitmix64 for the seed 0.
    assert [splitmix64(k * GOLDEN) for k in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31, 2**63 - 1, -5])
def test_bits_equal_python_integers(seed: int) -> None:
    index = torch.tensor([0, 1, 7, 2**40, 2**62])[:, None]
    position = torch.tensor([0, 1, 2, 4095, 2**33])[None, :]
    bits = random_bits(seed, Stream.LIKELIHOOD, Purpose.VALUE, index, position)
    assert bits.dtype == torch.int64
    for row, column in itertools.product(range(5), range(5)):
        words = (
            seed,
            Stream.LIKELIHOOD,
            Purpose.VALUE,
            int(index[row, 0]),
            int(position[0, column]),
        )
        assert int(bits[row, column]) & WORD == reference_bits(*words)


def test_known_values() -> None:
    index, position = counters(2, 3)
    assert random_bits(*DRAW, index, position).tolist() == GOLDEN_BITS
    assert uniform(*DRAW, index, position).tolist() == [
        [(bits & WORD) // 2**40 / 2**24 for bits in row] for row in GOLDEN_BITS
    ]
    torch.testing.assert_close(
        normal(*DRAW, index, position), torch.tensor(GOLDEN_NORMALS), rtol=1e-6, atol=1e-7
    )


def test_values_of_the_enums_are_part_of_the_noise() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "TRAINING": 0,
        "VALIDATION": 1,
        "LIKELIHOOD": 2,
        "INITIALIZATION": 3,
    }
    first = {"NOISE_LEVEL": 0, "MASK": 1, "LENGTH": 2, "INPUT_MASK": 3, "VALUE": 4}
    assert {name: Purpose[name].value for name in first} == first
    assert len({purpose.value for purpose in Purpose}) == len(Purpose.__members__)


def test_host_twin_gives_the_same_values() -> None:
    index, position = counters(40, 25)
    values = uniform(99, Stream.VALIDATION, Purpose.LENGTH, index, position)
    for row, column in itertools.product(range(40), range(25)):
        host = host_uniform(99, Stream.VALIDATION, Purpose.LENGTH, row, column)
        assert host == values[row, column].item()


def test_slices_hold_the_bits_of_the_whole() -> None:
    index, position = counters(64, 96)
    whole = {draw: draw(*DRAW, index, position) for draw in (random_bits, uniform, normal)}
    rows, columns = torch.tensor([3, 5, 50, 63]), torch.tensor([95, 0, 17, 18])
    for draw, values in whole.items():
        part = draw(*DRAW, rows[:, None], columns[None, :])
        assert torch.equal(part, values[rows][:, columns])
        flat = draw(*DRAW, rows, columns)
        assert torch.equal(flat, values[rows, columns])
        assert draw(*DRAW, torch.tensor(5), torch.tensor(17)).item() == values[5, 17].item()
        assert draw(*DRAW, index[:0], position).shape == (0, 96)


def test_the_counters_are_left_alone() -> None:
    index, position = counters(4, 4)
    random_bits(*DRAW, index, position)
    normal(*DRAW, index, position)
    assert torch.equal(index[:, 0], torch.arange(4))
    assert torch.equal(position[0], torch.arange(4))


def test_a_million_draws_are_distinct() -> None:
    bits = random_bits(*DRAW, *counters(1000, 1000))
    assert torch.unique(bits).numel() == 1_000_000


def test_uniform_moments_and_cells() -> None:
    values = uniform(*DRAW, *counters(1024, 1024))
    assert values.dtype == torch.float32
    sample = values.double().numpy().reshape(-1)
    assert sample.min() >= 0.0
    assert sample.max() < 1.0
    assert np.all(sample * 2**24 == np.floor(sample * 2**24))
    assert abs(sample.mean() - 0.5) < 4 * np.sqrt(1 / 12 / sample.size)
    assert abs(sample.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / sample.size)
    assert stats.chisquare(np.bincount((sample * 1024).astype(int), minlength=1024)).pvalue > 1e-3
    low_bits = (sample * 2**24).astype(np.int64) % 256
    assert stats.chisquare(np.bincount(low_bits, minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("axis", ["position", "index"])
def test_neighbours_are_uncorrelated(axis: str) -> None:
    """Over 40 seeds and 4 lags the standardised correlations are standard normal."""
    scores = []
    for seed in range(40):
        values = uniform(seed, Stream.TRAINING, Purpose.MASK, *counters(128, 256)).double().numpy()
        values = values if axis == "position" else values.T
        scores += [correlation_z(values[:, lag:], values[:, :-lag]) for lag in (1, 2, 3, 8)]
    assert abs(np.mean(scores)) < 4 / np.sqrt(len(scores))
    assert abs(np.mean(np.square(scores)) - 1) < 4 * np.sqrt(2 / len(scores))
    assert np.max(np.abs(scores)) < 4.5


def test_streams_purposes_and_neighbouring_seeds_are_uncorrelated() -> None:
    keys = [
        (seed, stream, purpose)
        for seed in (0, 1, 2, 1234)
        for stream in (Stream.TRAINING, Stream.VALIDATION, Stream.LIKELIHOOD)
        for purpose in (Purpose.NOISE_LEVEL, Purpose.MASK, Purpose.LENGTH)
    ]
    draws = [uniform(*key, *counters(64, 64)).double().numpy() for key in keys]
    scores = [correlation_z(left, right) for left, right in itertools.combinations(draws, 2)]
    assert abs(np.mean(np.square(scores)) - 1) < 4 * np.sqrt(2 / len(scores))
    assert np.max(np.abs(scores)) < 4.8


def test_swapping_counters_gives_other_noise() -> None:
    """(index, position) and (position, index) are different draws, as are (seed, stream) pairs."""
    values = random_bits(*DRAW, *counters(64, 64))
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    assert not torch.any((values == values.T) & off_diagonal)
    index, position = counters(1, 8)
    assert not torch.equal(
        random_bits(0, 1, 0, index, position), random_bits(1, 0, 0, index, position)
    )


def test_normal_moments_and_distribution() -> None:
    values = normal(7, Stream.INITIALIZATION, Purpose.VALUE, *counters(900, 700))
    assert values.dtype == torch.float32
    sample = values.double().numpy().reshape(-1)
    standard_error = 1 / np.sqrt(sample.size)
    assert abs(sample.mean()) < 4 * standard_error
    assert abs(sample.var() - 1) < 4 * np.sqrt(2) * standard_error
    assert abs(stats.skew(sample)) < 4 * np.sqrt(6) * standard_error
    assert abs(stats.kurtosis(sample)) < 4 * np.sqrt(24) * standard_error
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    lags = [np.mean(sample[lag:] * sample[:-lag]) / standard_error for lag in (1, 2, 700)]
    assert np.max(np.abs(lags)) < 4


@pytest.mark.parametrize("row_counts", [[640, 60], [1] * 7 + [693]])
def test_normal_of_a_large_parameter_does_not_depend_on_its_chunks(row_counts: list[int]) -> None:
    """A tensor-parallel rank that draws only its rows gets the rows of the whole matrix."""
    index, position = counters(700, 900)
    whole = normal(*DRAW, index, position)
    parts = [normal(*DRAW, rows, position) for rows in index.split(row_counts)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(normal(*DRAW, index, position[:, 450:]), whole[:, 450:])
