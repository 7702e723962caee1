"""Which task of how many: from the flags, else from Slurm; never a guess."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.preprocessing.array_task import ArrayTask, array_task

CONFIG = PreprocessConfig(["text.jsonl"], "out/text", "tokenizer")


def slurm(number: int, first: int, last: int, count: int, step: int | None = 1) -> dict[str, str]:
    """As sbatch --array=first-last:step sets them."""
    values = {"ID": number, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(v) for name, v in values.items() if v is not None}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (slurm(0, 0, 7, 8), (0, 8)),
        (slurm(7, 0, 7, 8), (7, 8)),
        (slurm(3, 1, 4, 4), (2, 4)),
        (slurm(15, 5, 25, 5, 5), (2, 5)),
        (slurm(6, 6, 6, 1), (0, 1)),
        (slurm(2, 0, 7, 8, None), (2, 8)),
        # The end of the range need not be reached by the steps; Slurm then says the last number.
        (slurm(4, 0, 8, 3, 4), (1, 3)),
    ],
)
def test_slurm(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert array_task(CONFIG, environment) == ArrayTask(*expected)


def test_flags_win() -> None:
    config = replace(CONFIG, array_index=1, array_count=3)
    assert array_task(config, slurm(0, 0, 7, 8)) == ArrayTask(1, 3)


@pytest.mark.parametrize(
    "environment",
    [
        slurm(3, 1, 7, 3),  # --array=1,3,7
        slurm(9, 0, 7, 8),
        slurm(3, 0, 8, 3, 4),
        {"SLURM_ARRAY_TASK_ID": "3"},
        {**slurm(0, 0, 7, 8), "SLURM_ARRAY_TASK_COUNT": "eight"},
    ],
)
def test_an_array_that_is_no_range_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give array_index and array_count") as caught:
        array_task(CONFIG, environment)
    assert f"SLURM_ARRAY_TASK_ID={environment['SLURM_ARRAY_TASK_ID']}" in str(caught.value)


def test_overwriting_in_an_array_is_refused() -> None:
    with pytest.raises(ValueError, match="remove each other's shards"):
        array_task(replace(CONFIG, overwrite=True), slurm(0, 0, 7, 8))


def test_every_job_has_exactly_one_task() -> None:
    for count in (1, 2, 7):
        tasks = [ArrayTask(index, count) for index in range(count)]
        assert all(sum(task.has(job) for task in tasks) == 1 for job in range(20))
