"""A study: one base configuration, axes of changes, and the runs that their product makes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.config.derive import resolve
from megatron_dlm.config.keys import suggestion
from megatron_dlm.config.parse import RepeatedParser, keys_of_file, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.scaling.figures.kinds import Spec, parse_figures

_KEYS = ("name", "question", "base", "num_gpus", "set", "axes", "combined", "leave_out", "figures")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_AXIS = re.compile(r"[A-Za-z]\w*")

COLUMNS_OF_RUNS = (
    *("study", "run", "num_parameters", "training_flops_per_token", "unique_tokens", "commit"),
    *("uncommitted_changes", "num_parameters_without_embeddings", "flops_per_token_six_n"),
    *("flops_per_token_six_p_and_attention", "step", "split", "tokens", "training_flops", "epoch"),
)
"""Columns of every table of results: no axis may have one of these names."""
_RUNS = "{runs}"
_PARENT = re.compile(r"\{runs\}/([^/]+)")

Settings = dict[str, Any]
"""Dotted key of RunConfig -> value; `config` -> files, as --config of the run."""

Place = Mapping[str, Sequence[str]]
"""Axis -> labels: every run that has one of them on each of these axes."""


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

    def config(self, output_dir: Path) -> RunConfig:
        """The checked configuration; raises ValueError, which names the run, where it is wrong."""
        flags = [*self.flags_in(output_dir.parent), "--train.output_dir", str(output_dir)]
        with _naming(self):
            return parse(RunConfig, flags, f"run {self.name}")

    def flags_in(self, runs: Path) -> list[str]:
        """The flags of this run where the runs of the study lie in this folder."""
        return [flag.replace(_RUNS, str(runs)) for flag in self.flags]


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
        parser = RepeatedParser(RunConfig, "megatron-dlm train")
        found = {}
        for run in self.runs:
            with _naming(run):
                output = ["--train.output_dir", str(runs / run.name)]
                config = resolve(parser.parse([*run.flags_in(runs), *output]))
                check(config, world_size)
            found[run.name] = config
        return found

    def check(self, world_size: int = 1) -> None:
        """Refuse the study if one of its runs could not start."""
        self.configs(Path("runs"), world_size)

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


@contextmanager
def _naming(run: StudyRun) -> Iterator[None]:
    """Put the name of the run before what is wrong with it."""
    try:
        yield
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
    spec = _load(path)
    unknown = sorted(spec.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]} (have: {', '.join(_KEYS)})")
    axes = {
        name: _axis(path, name, values) for name, values in _mapping(path, spec, "axes").items()
    }
    if not axes:
        raise ValueError(f"{path}: axes is empty; give one axis of one label at least")
    combined = _combined(path, spec, axes)
    runs = _expand(path, spec, axes, combined)
    _check_parents(path, runs)
    study = Study(
        name=str(spec.get("name", path.stem)),
        question=str(spec.get("question", "")),
        axes=tuple(axes),
        runs=tuple(runs),
        num_gpus=_num_gpus(path, spec),
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
    left_out = [_place(path, "leave_out", item, axes) for item in _list(path, spec, "leave_out")]
    base = _files(path, "base", spec.get("base"))
    shared = _mapping(path, spec, "set")
    if "config" in shared:
        raise ValueError(f"{path}: set has config; name files of every run under base")
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
                    f"{path}: run {run.name} goes on from {_RUNS}/{parent}, which is no run of "
                    f"this study{suggestion(parent, names)}"
                )


def _num_gpus(path: Path, spec: Mapping[str, Any]) -> int:
    number = spec.get("num_gpus", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{path}: num_gpus is {number!r}; expected a whole number from 1 on")
    return number


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


def _axis(path: Path, name: Any, values: Any) -> dict[str, Settings]:
    if not isinstance(name, str) or not _AXIS.fullmatch(name) or name in COLUMNS_OF_RUNS:
        raise ValueError(
            f"{path}: axes has the name {name!r}; axes become columns of the table of results: "
            f"letters, digits and _, and none of {', '.join(COLUMNS_OF_RUNS)}"
        )
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
    found = {label: dict(settings or {}) for label, settings in values.items()}
    for label, settings in found.items():
        if "config" in settings:
            place = f"axes.{name}.{label}.config"
            settings["config"] = _files(path, place, settings["config"])
    return found


def _list(path: Path, spec: Mapping[str, Any], key: str) -> list[Any]:
    items = spec.get(key) or []
    if not isinstance(items, list):
        raise ValueError(f"{path}: {key} is {items!r}; expected a list")
    return items


def _place(
    path: Path, key: str, named: Any, axes: Mapping[str, Mapping[str, Settings]]
) -> dict[str, Sequence[str]]:
    """Axis -> its labels that are meant."""
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{path}: {key} has {named!r}; expected axis: label")
    place: dict[str, Sequence[str]] = {}
    for axis, labels in named.items():
        place[axis] = labels if isinstance(labels, list) else [labels]
        for label in place[axis]:
            if axis not in axes or label not in axes[axis]:
                raise ValueError(f"{path}: {key} names {axis}: {label}, which no axis has")
    return place


def _is_at(labels: Mapping[str, str], place: Place) -> bool:
    return all(labels[axis] in meant for axis, meant in place.items())


def _combined(
    path: Path, spec: Mapping[str, Any], axes: Mapping[str, Mapping[str, Settings]]
) -> list[tuple[Place, Settings]]:
    found: list[tuple[Place, Settings]] = []
    for item in _list(path, spec, "combined"):
        is_whole = isinstance(item, dict) and item.keys() == {"at", "set"}
        if not is_whole or not isinstance(item["set"], dict) or "config" in item["set"]:
            raise ValueError(
                f"{path}: combined has {item!r}; expected at: {{axis: label}} and set: settings"
            )
        found.append((_place(path, "combined.at", item["at"], axes), item["set"]))
    return found


def _files(path: Path, place: str, named: Any) -> list[str]:
    """Files beside that of the study, or presets, as --config takes them."""
    files = [named] if isinstance(named, str) else named or []
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: {place} is {named!r}; expected a file or a list of files")
    return [
        file if file.startswith("preset:") else os.path.normpath(path.parent / file)
        for file in files
    ]
