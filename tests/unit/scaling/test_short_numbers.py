"""Numbers with units: rounding may reach the next unit."""

from __future__ import annotations

import pytest

from megatron_dlm.scaling.short_numbers import with_unit


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [
        *(
            (12_345_678, 4, "12.35M"),
            (999_600, 3, "1M"),
            (999_996, 4, "1M"),
            (999_600, 4, "999.6k"),
        ),
        *(
            (999.96, 4, "1k"),
            (999.4, 3, "999"),
            (0.5, 4, "0.5"),
            (-2048, 4, "-2.048k"),
            (0, 3, "0"),
        ),
        *((1.5e12, 3, "1.5T"), (9.996e14, 3, "1e+15"), (6.02e21, 3, "6.02e+21")),
    ],
)
def test_units(value: float, digits: int, words: str) -> None:
    assert with_unit(value, digits=digits) == words


def test_a_gap_stands_before_the_unit_only() -> None:
    assert with_unit(2000, gap=" ") == "2 k"
    assert with_unit(200, gap=" ") == "200"
