"""Where runs were trained with other settings than their study gives them now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dlm.config.keys import leaf_types
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.scaling.run_records import read_config, settings_in
from megatron_dlm.scaling.study import Study, StudyRun
from megatron_dlm.scaling.study_parts import RUNS

_MOST_NAMES = 3
# How a run is computed, kept and logged, not what it is; a run that goes on may change it.
_FREE_SECTIONS = ("parallel", "checkpoint", "logging", "recovery")
_FREE_KEYS = (
    *("train.output_dir", "train.device", "train.resume", "train.deterministic"),
    *("train.micro_batch_size", "model.transformer_impl", "model.attention_backend"),
    *("model.recompute_granularity", "model.recompute_num_layers", "model.recompute_modules"),
)
KEYS = tuple(
    key
    for key in leaf_types(RunConfig)
    if key.partition(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS
)
"""Dotted keys that are compared."""
SECTIONS = {key.partition(".")[0] for key in KEYS}
"""Sections of config.yaml that have them."""


class Contradictions:
    """Those of many runs: a setting of the whole study is told once, not once for each run."""

    def __init__(self, study: Study, runs_folder: Path) -> None:
        self._runs: dict[str, list[str]] = {}
        self._wanted: dict[str, RunConfig] = {}
        self._unknown = ""
        try:
            self._wanted = study.written(runs_folder)
        except ValueError as error:  # the runs are still there to be read
            self._unknown = f"the runs are not compared with the study, which is wrong: {error}"

    def add(self, run: StudyRun, found: Mapping[str, Any]) -> None:
        """Compare with the settings that a run had, by dotted key."""
        if run.name not in self._wanted:
            return
        wanted = settings_in(asdict(self._wanted[run.name]), KEYS)
        for key in KEYS:
            # A run replaces null and auto by what it found; the folder may lie elsewhere now.
            is_open = wanted[key] in (None, "auto") or RUNS in str(run.settings.get(key))
            if key in found and not is_open and not _same(wanted[key], found[key]):
                text = f"trained with {key} {found[key]}, the study says {wanted[key]}"
                self._runs.setdefault(text, []).append(run.name)

    def add_config(self, run: StudyRun, config: Mapping[str, Any]) -> None:
        """Compare with a config.yaml, or its SECTIONS."""
        self.add(run, settings_in(config, KEYS))

    def lines(self) -> list[str]:
        """A line for each that was found; the runs are named first."""
        unknown = [self._unknown] if self._unknown else []
        return unknown + [f"{_named(names)} {text}" for text, names in self._runs.items()]


def contradictions_of(study: Study, runs: Sequence[StudyRun], runs_folder: Path) -> list[str]:
    """What is to be said of runs whose config.yaml lies in their folders."""
    found = Contradictions(study, runs_folder)
    warnings: list[str] = []
    for run in runs:
        path = runs_folder / run.name / "config.yaml"
        if path.is_file():
            found.add_config(run, read_config(path, SECTIONS, warnings))
    return warnings + found.lines()


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]}: was"
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "") + ": were"


def _same(wanted: Any, found: Any) -> bool:
    # A table of text holds the words of true, and of a number that is a label.
    return bool(wanted == found) or str(wanted) == str(found)
