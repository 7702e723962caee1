"""Which share of the work this process has, where many tasks divide it without talking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dlm.config.commands import PreprocessConfig


@dataclass(frozen=True)
class ArrayTask:
    """Task `index` of `count` takes every count-th job, beginning with job `index`."""

    index: int
    count: int

    def has(self, job: int) -> bool:
        return job % self.count == self.index


def array_task(config: PreprocessConfig, environment: Mapping[str, str]) -> ArrayTask:
    """From the configuration, else from the job array that Slurm started this process in.

    Raises ValueError where Slurm's numbers do not say which task of how many this is.
    """
    if config.array_index is not None and config.array_count is not None:
        return ArrayTask(config.array_index, config.array_count)
    if not environment.get("SLURM_ARRAY_TASK_ID"):
        return ArrayTask(0, 1)
    task = _from_slurm(environment)
    if config.overwrite and task.count > 1:
        raise ValueError(
            "overwrite would let the tasks of this Slurm array remove each other's shards; remove "
            "them before the array starts"
        )
    return task


def _from_slurm(environment: Mapping[str, str]) -> ArrayTask:
    names = [f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "MIN", "MAX", "COUNT", "STEP")]
    texts = [environment.get(name, "1" if name.endswith("STEP") else "") for name in names]
    if all(text.isdigit() for text in texts):
        number, first, last, count, step = (int(text) for text in texts)
        is_regular = step > 0 and first <= number <= last and last == first + (count - 1) * step
        if is_regular and (number - first) % step == 0:
            return ArrayTask((number - first) // step, count)
    said = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
    raise ValueError(
        f"Slurm's job array is no regular range ({said}); give array_index and array_count"
    )
