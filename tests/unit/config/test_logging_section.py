"""The section `logging` refuses what cannot be reported."""

from __future__ import annotations

import pytest

from megatron_dlm.config.schema import LoggingConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_level_buckets": -1}, "logging.noise_level_buckets is -1; it must lie in"),
        ({"noise_level_buckets": 101}, "logging.noise_level_buckets is 101; it must lie in"),
        (
            {"norms_interval_steps": 15},
            "logging.norms_interval_steps is 15; it must be a multiple of "
            "logging.interval_steps 10",
        ),
        ({"histogram_interval_steps": 0}, "logging.histogram_interval_steps is 0; it must be"),
        (
            {"histogram_interval_steps": 20, "tensorboard": False},
            "logging.histogram_interval_steps writes to TensorBoard, but logging.tensorboard is",
        ),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        LoggingConfig(**fields)


def test_multiples_of_the_interval():
    LoggingConfig(interval_steps=5, norms_interval_steps=5, histogram_interval_steps=500)
