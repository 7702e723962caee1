"""A study: one base configuration, axes of changes, and the runs that their product makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.keys import suggestion
from megatron_dlm.config.parse import RepeatedParser, keys_of_file
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.scaling.figures.kinds import Spec, parse_figures
from megatron_dlm.scaling.study_parts import (
    RUNS,
    Place,
    Settings,
    axis_at,
    combined_at,
    files_at,
    list_at,
    load_file,
    mapping_at,
    num_gpus_of,
    place_at,
    settings_at,
)

_KEYS = ("name", "question", "base", "num_gpus", "set", "axes", "combined", "leave_out", "figures")
_PARENT = re.compile(re.escape(RUNS) + r"/([^/]+)")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    name: str
    """Its labels, joined by _: stable as long as the study's axes are."""
    labels: Mapping[str, str]
    """Axis -> label."""
    settings: Mapping[str, Any]
    """Dotted key of RunConfig -> value: those of all runs, changed by those of its labels."""
    flags: tuple[str, ...]
    """What follows `megatron-dlm train`, without the output directory; {runs} is to be filled."""
    after: tuple[str, ...] = ()
    """Names of the runs whose checkpoints it needs."""

    def flags_in(self, runs: Path) -> list[str]:
        """The flags of this run where the runs of the study lie in this folder."""
        return [flag.replace(RUNS, str(runs)) for flag in self.flags]


@dataclass(frozen=True)
class Study:
    """All runs, in the order of the axes."""

    name: str
    question: str
    axes: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    num_gpus: int = 1
    """Ranks that every run is meant for."""
    settings: tuple[str, ...] = ()
    """Dotted keys of RunConfig that an axis sets, in the order of the file."""
    figures: Mapping[str, Spec] = field(default_factory=dict)
    """What `study report` draws: stem of the files -> keys of the figure's kind."""

    def labels_of(self, axis: str) -> tuple[str, ...]:
        """The labels of an axis that runs have, in the order of the file."""
        return tuple(dict.fromkeys(run.labels[axis] for run in self.runs))

    def configs(self, runs: Path, world_size: int = 1) -> dict[str, RunConfig]:
        """Name -> resolved configuration of all runs, which could start on this many ranks.

        Hundreds take seconds. Reads tokenizers, and no data. Raises ValueError, which names the
        run, where one is wrong.
        """
        found = {}
        for name, config in self.written(runs).items():
            try:
                found[name] = resolve(config)
                check(found[name], world_size)
            except ValueError as error:
                raise ValueError(f"run {name}: {error}") from None
        return found

    def written(self, runs: Path) -> dict[str, RunConfig]:
        """The same before anything is read from a tokenizer or checked against other settings."""
        parser = RepeatedParser(RunConfig, "megatron-dlm train")
        found = {}
        for run in self.runs:
            output = ["--train.output_dir", str(runs / run.name)]
            try:
                found[run.name] = parser.parse([*run.flags_in(runs), *output])
            except ValueError as error:
                raise ValueError(f"run {run.name}: {error}") from None
        return found

    def waves(self) -> list[tuple[StudyRun, ...]]:
        """All runs; those of a wave need checkpoints of earlier waves only.

        Raises ValueError where runs wait for each other.
        """
        done: set[str] = set()
        waves = []
        waiting = self.runs
        while waiting:
            wave = tuple(run for run in waiting if done.issuperset(run.after))
            if not wave:
                names = ", ".join(run.name for run in waiting)
                raise ValueError(f"study {self.name}: these runs wait for each other: {names}")
            waves.append(wave)
            done.update(run.name for run in wave)
            waiting = tuple(run for run in waiting if run.name not in done)
        return waves


def read_study(path: Path) -> Study:
    """The study in a YAML file.

        name: unique_budgets
        question: When does diffusion overtake AR on repeated text?
        base: [tiny.yaml]                # --config of every run, beside the study's file
        set: {train.steps: 400}          # flags of every run
        axes:                            # every combination is a run
          objective: {ar: {objective.kind: autoregressive}, masked: {objective.kind: masked}}
          seed: {s1: {train.seed: 1}, s2: {train.seed: 2}}
        combined:                        # settings where labels meet, after those of the axes
          - {at: {objective: masked, seed: [s1, s2]}, set: {train.steps: 500}}
        leave_out: [{objective: ar, seed: s2}]
        num_gpus: 8                      # ranks of every run; for `study plan`
        figures:                         # what `study report` draws (docs/science.md)
          crossover: {kind: crossover, axis: objective, first: ar, second: masked}

    A label may also name files (config: ../configs/x.yaml), which all settings come after. In
    settings {AXIS} is the label of the run, and {runs} the folder of the study's runs, for a run
    that goes on from another: train.start_from: "{runs}/constant_{seed}/checkpoints/iter_0000800".

    Raises ValueError, which names the file and the place, for anything else.
    """
    spec = load_file(path)
    for key in spec:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key {key} (have: {', '.join(_KEYS)})")
    axes = {
        name: axis_at(path, name, values) for name, values in mapping_at(path, spec, "axes").items()
    }
    if not axes:
        raise ValueError(f"{path}: axes is empty; give one axis of one label at least")
    combined = combined_at(path, spec, axes)
    runs = _expand(path, spec, axes, combined)
    _check_parents(path, runs)
    _refuse_twins(path, runs)
    study = Study(
        name=str(spec.get("name") or path.stem),
        question=str(spec.get("question") or ""),
        axes=tuple(axes),
        runs=tuple(runs),
        num_gpus=num_gpus_of(path, spec),
        settings=_settings(axes, combined),
    )
    study.waves()
    return replace(study, figures=parse_figures(path, spec.get("figures") or {}, study))


def _expand(
    path: Path,
    spec: Mapping[str, Any],
    axes: Mapping[str, Mapping[str, Settings]],
    combined: Sequence[tuple[Place, Settings]],
) -> list[StudyRun]:
    """A run for every combination of labels that is not left out."""
    left_out = [
        place_at(path, f"leave_out entry {number}", item, axes)
        for number, item in enumerate(list_at(path, spec, "leave_out"), 1)
    ]
    base = files_at(path, "base", spec.get("base"))
    shared = mapping_at(path, spec, "set")
    if "config" in shared:
        raise ValueError(f"{path}: set has config; name files of every run under base")
    shared = settings_at(path, "set", shared)
    runs = []
    for labels in product(*axes.values()):
        place = dict(zip(axes, labels, strict=True))
        if any(_is_at(place, item) for item in left_out):
            continue
        files, settings = list(base), dict(shared)
        for axis, label in place.items():
            settings.update(axes[axis][label])
            files += settings.pop("config", [])
        for where, more in combined:
            settings.update(more if _is_at(place, where) else {})
        runs.append(_run(place, files, settings))
    if not runs:
        raise ValueError(f"{path}: leave_out leaves nothing")
    return runs


def _run(place: Mapping[str, str], files: Sequence[str], settings: Settings) -> StudyRun:
    for axis, label in place.items():
        settings = {
            key: value.replace(f"{{{axis}}}", label) if isinstance(value, str) else value
            for key, value in settings.items()
        }
    flags = [word for file in files for word in ("--config", file)]
    for key, value in settings.items():
        # JSON is YAML, so every value survives.
        flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    parents = dict.fromkeys(name for flag in flags for name in _PARENT.findall(flag))
    return StudyRun(
        name="_".join(place.values()),
        labels=place,
        flags=tuple(flags),
        after=tuple(parents),
        settings=settings,
    )


def _settings(
    axes: Mapping[str, Mapping[str, Settings]], combined: Sequence[tuple[Place, Settings]]
) -> tuple[str, ...]:
    """Dotted keys that any label sets, also by its files, or labels together."""
    keys: dict[str, None] = {}
    of_labels = [label for axis in axes.values() for label in axis.values()]
    for settings in [*of_labels, *(settings for _, settings in combined)]:
        for key, value in settings.items():
            names = [key]
            if key == "config":
                names = [name for file in value for name in keys_of_file(RunConfig, file)]
            keys.update(dict.fromkeys(names))
    return tuple(keys)


def _check_parents(path: Path, runs: Sequence[StudyRun]) -> None:
    names = {run.name for run in runs}
    for run in runs:
        for parent in run.after:
            if parent not in names:
                raise ValueError(
                    f"{path}: run {run.name} goes on from {RUNS}/{parent}, which is no run of "
                    f"this study{suggestion(parent, names)}"
                )


def _refuse_twins(path: Path, runs: Sequence[StudyRun]) -> None:
    """Two runs of the same settings would count as repetitions of an experiment."""
    names: dict[tuple[str, ...], str] = {}
    for run in runs:
        files = run.flags[: len(run.flags) - 2 * len(run.settings)]
        settings = sorted(f"{key} {json.dumps(value)}" for key, value in run.settings.items())
        twin = names.setdefault((*files, *settings), run.name)
        if twin != run.name:
            raise ValueError(
                f"{path}: runs {twin} and {run.name} have the same settings; their labels must "
                "differ in one, such as train.seed"
            )


def _is_at(labels: Mapping[str, str], place: Place) -> bool:
    return all(labels[axis] in meant for axis, meant in place.items())
