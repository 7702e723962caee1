"""Every checkpoint of a run for `evaluate`, each into a folder of its own; again to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.find import find_checkpoints
from megatron_dlm.config.evaluation_commands import EvaluateConfig
from megatron_dlm.config.json_text import parse_json
from megatron_dlm.scaling.run_evaluations import FOLDER


def each_checkpoint(config: EvaluateConfig) -> Iterator[EvaluateConfig]:
    """What to evaluate of every checkpoint of a run, by step; what is there is left out.

    Raises ValueError, before anything is evaluated, where the run has no checkpoint and where
    results of other settings lie in the way.
    """
    run = Path(config.model)
    folder = run / FOLDER if config.output_dir is None else Path(config.output_dir)
    checkpoints = find_checkpoints(run)
    left = [
        one
        for checkpoint in checkpoints
        if (one := _left(config, checkpoint.step, folder / checkpoint.path.name)) is not None
    ]
    print(f"{run}: {len(left)} of {len(checkpoints)} checkpoints to evaluate")
    for one in left:
        print(f"step {one.step:,}")
        yield one


def _left(config: EvaluateConfig, step: int, directory: Path) -> EvaluateConfig | None:
    """What is not there yet of one checkpoint's evaluation; None where all is."""
    has_data = _is_there(directory / "data.json", config.data_settings, config.data)
    has_tasks = _is_there(directory / "tasks.json", config.task_settings, config.tasks)
    if has_data and has_tasks:
        return None
    one = replace(config, every_checkpoint=False, step=step, output_dir=str(directory))
    if has_data:
        one = replace(one, data=[])
    return replace(one, tasks=[], include_path=[], num_fewshot=None) if has_tasks else one


def _is_there(path: Path, settings: Mapping[str, Any], asked: list[str]) -> bool:
    """Whether a report with these settings lies there, or nothing was asked for.

    Raises ValueError for a report with others.
    """
    if not asked or not path.exists():
        return not asked
    remedy = "give another output_dir, or remove it"
    try:
        before = dict(parse_json(path.read_bytes())["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not say how it was made; {remedy}") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {before.get(name)}, not {value}; {remedy}"
            )
    return True
