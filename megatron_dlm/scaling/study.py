"""A study: one base configuration, axes of changes, and the runs that their product makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check

_KEYS = ("name", "question", "base", "set", "axes", "leave_out")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")

Settings = dict[str, Any]
"""Dotted key of RunConfig -> value."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    name: str
    """Its labels, joined by _: stable as long as the study's axes are."""
    labels: Mapping[str, str]
    """Axis -> label."""
    flags: tuple[str, ...]
    """What follows `megatron-dlm train`, without the output directory."""

    def config(self, output_dir: Path) -> RunConfig:
        """The checked configuration; raises ValueError, which names the run, where it is wrong."""
        try:
            flags = [*self.flags, "--train.output_dir", str(output_dir)]
            config = parse(RunConfig, flags, f"run {self.name}")
        except ValueError as error:
            raise ValueError(f"run {self.name}: {error}") from None
        return config


@dataclass(frozen=True)
class Study:
    """All runs, in the order of the axes."""

    name: str
    question: str
    axes: tuple[str, ...]
    runs: tuple[StudyRun, ...]

    def check(self, world_size: int = 1) -> None:
        """Refuse the study if one of its runs could not start; reads tokenizers, and no data."""
        for run in self.runs:
            config = run.config(Path("runs"))
            try:
                check(resolve(config), world_size)
            except ValueError as error:
                raise ValueError(f"run {run.name}: {error}") from None


def read_study(path: Path) -> Study:
    """The study in a YAML file.

        name: unique_budgets
        question: When does diffusion overtake AR on repeated text?
        base: [tiny.yaml]                # --config of every run, beside the study's file
        set: {train.steps: 400}          # flags of every run
        axes:                            # every combination is a run
          objective: {ar: {objective.kind: autoregressive}, masked: {objective.kind: masked}}
          seed: {s1: {train.seed: 1}, s2: {train.seed: 2}}
        leave_out: [{objective: ar, seed: s2}]

    Raises ValueError, which names the file and the place, for anything else.
    """
    spec = _load(path)
    unknown = sorted(spec.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]} (have: {', '.join(_KEYS)})")
    axes = {
        name: _axis(path, name, values) for name, values in _mapping(path, spec, "axes").items()
    }
    if not axes:
        raise ValueError(f"{path}: axes is empty; give one axis of one label at least")
    left_out = _left_out(path, spec.get("leave_out") or [], axes)
    base = [argument for file in _base(path, spec) for argument in ("--config", file)]
    shared = _mapping(path, spec, "set")
    runs = []
    for labels in product(*axes.values()):
        place = dict(zip(axes, labels, strict=True))
        if any(item.items() <= place.items() for item in left_out):
            continue
        settings = dict(shared)
        for axis, label in place.items():
            settings.update(axes[axis][label])
        runs.append(StudyRun("_".join(labels), place, (*base, *_flags(settings))))
    if not runs:
        raise ValueError(f"{path}: leave_out leaves nothing")
    name = str(spec.get("name", path.stem))
    return Study(name, str(spec.get("question", "")), tuple(axes), tuple(runs))


def _load(path: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"study {path}: cannot read the file ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"study {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(spec, dict):
        raise ValueError(f"study {path}: expected keys such as `axes:` at the top level")
    return spec


def _mapping(path: Path, spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = spec.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; expected a mapping")
    return value


def _axis(path: Path, name: str, values: Any) -> dict[str, Settings]:
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path}: axes.{name} needs labels, each with its settings")
    for label, settings in values.items():
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise ValueError(
                f"{path}: axes.{name} has the label {label!r}; labels become names of folders: "
                "letters, digits, and . + - behind the first"
            )
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{path}: axes.{name}.{label} is {settings!r}; expected settings")
    return {label: dict(settings or {}) for label, settings in values.items()}


def _left_out(
    path: Path, items: Any, axes: Mapping[str, Mapping[str, Settings]]
) -> list[dict[str, str]]:
    if not isinstance(items, list):
        raise ValueError(f"{path}: leave_out is {items!r}; expected a list of axis: label")
    for item in items:
        for axis, label in item.items() if isinstance(item, dict) else [(item, None)]:
            if axis not in axes or label not in axes[axis]:
                raise ValueError(f"{path}: leave_out names {axis}: {label}, which no axis has")
    return items


def _base(path: Path, spec: Mapping[str, Any]) -> list[str]:
    base = spec.get("base") or []
    files = [base] if isinstance(base, str) else base
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: base is {base!r}; expected a file or a list of files")
    return [file if file.startswith("preset:") else str(path.parent / file) for file in files]


def _flags(settings: Settings) -> Sequence[str]:
    """Flags of `train`; JSON is YAML, so every value survives."""
    flags = []
    for key, value in settings.items():
        flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return flags
