"""The parts of a study file: each read from YAML, and refused with its place and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.config.keys import leaf_types, suggestion
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.strict_yaml import parse_yaml

COLUMNS_OF_RUNS = (
    *("study", "run", "num_parameters", "training_flops_per_token", "unique_tokens", "commit"),
    *("uncommitted_changes", "num_parameters_without_embeddings", "flops_per_token_six_n"),
    *("flops_per_token_six_p_and_attention", "step", "split", "tokens", "training_flops", "epoch"),
)
"""Columns of every table of results: no axis may have one of these names."""

RUNS = "{runs}"
"""In settings: the folder of the study's runs."""

Settings = dict[str, Any]
"""Dotted key of RunConfig -> value; `config` -> files, as --config of the run."""

Place = Mapping[str, Sequence[str]]
"""Axis -> labels: every run that has one of them on each of these axes."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_AXIS = re.compile(r"[A-Za-z]\w*")


def num_gpus_of(path: Path, spec: Mapping[str, Any]) -> int:
    number = spec.get("num_gpus", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{path}: num_gpus is {number!r}; expected a whole number from 1 on")
    return number


def load_file(path: Path) -> dict[str, Any]:
    try:
        spec = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"study {path}: cannot read the file ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"study {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(spec, dict):
        raise ValueError(f"study {path}: expected keys such as `axes:` at the top level")
    return spec


def mapping_at(path: Path, spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = spec.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; expected a mapping")
    return value


def axis_at(path: Path, name: Any, values: Any) -> dict[str, Settings]:
    if not isinstance(name, str) or not _AXIS.fullmatch(name) or name in COLUMNS_OF_RUNS:
        raise ValueError(
            f"{path}: axes has the name {name!r}; axes become columns of the table of results: "
            f"letters, digits and _, and none of {', '.join(COLUMNS_OF_RUNS)}"
        )
    if f"{{{name}}}" == RUNS:
        raise ValueError(
            f"{path}: axes has the name {name}, but in settings {RUNS} is the folder of the "
            "study's runs; give the axis another name"
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
    found = {}
    for label, settings in values.items():
        place, settings = f"axes.{name}.{label}", dict(settings or {})
        files = settings.pop("config", None)
        found[label] = settings_at(path, place, settings)
        if files is not None:
            found[label]["config"] = files_at(path, f"{place}.config", files)
    return found


def settings_at(path: Path, place: str, settings: Settings) -> Settings:
    """The settings, whose keys a run has; whether their values fit is seen where they meet."""
    known = _known_keys()
    for key in settings:
        if key not in known:
            raise ValueError(f"{path}: {place}: unknown key {key}{suggestion(str(key), known)}")
        if key == "train.output_dir":
            raise ValueError(
                f"{path}: {place}: {key} is given, but every run of a study lies in a folder of "
                "its own under --output_dir of the command; remove it"
            )
    return settings


@cache
def _known_keys() -> Mapping[str, Any]:
    return leaf_types(RunConfig)


def list_at(path: Path, spec: Mapping[str, Any], key: str) -> list[Any]:
    items = spec.get(key) or []
    if not isinstance(items, list):
        raise ValueError(f"{path}: {key} is {items!r}; expected a list")
    return items


def place_at(
    path: Path, key: str, named: Any, axes: Mapping[str, Mapping[str, Settings]]
) -> dict[str, Sequence[str]]:
    """Axis -> its labels that are meant."""
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{path}: {key} has {named!r}; expected axis: label")
    place: dict[str, Sequence[str]] = {}
    for axis, labels in named.items():
        if axis not in axes:
            meant = suggestion(str(axis), axes)
            raise ValueError(f"{path}: {key} names {axis}, which is no axis{meant}")
        place[axis] = labels if isinstance(labels, list) else [labels]
        if place[axis] == []:
            raise ValueError(f"{path}: {key} names no label of {axis}; leave the axis out")
        for label in place[axis]:
            if not isinstance(label, str) or label not in axes[axis]:
                meant = suggestion(str(label), axes[axis])
                raise ValueError(
                    f"{path}: {key} names {axis}: {label}, which is no label of it{meant} "
                    f"(have: {', '.join(axes[axis])})"
                )
    return place


def combined_at(
    path: Path, spec: Mapping[str, Any], axes: Mapping[str, Mapping[str, Settings]]
) -> list[tuple[Place, Settings]]:
    found: list[tuple[Place, Settings]] = []
    for number, item in enumerate(list_at(path, spec, "combined"), 1):
        place = f"combined entry {number}"
        is_whole = isinstance(item, dict) and item.keys() == {"at", "set"}
        if not is_whole or not isinstance(item["set"], dict) or "config" in item["set"]:
            raise ValueError(
                f"{path}: {place} is {item!r}; expected at: {{axis: label}} and set: settings"
            )
        at = place_at(path, f"{place}: at", item["at"], axes)
        found.append((at, settings_at(path, f"{place}: set", item["set"])))
    return found


def files_at(path: Path, place: str, named: Any) -> list[str]:
    """Files beside that of the study, or presets, as --config takes them."""
    files = [named] if isinstance(named, str) else named or []
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: {place} is {named!r}; expected a file or a list of files")
    return [
        file if file.startswith("preset:") else os.path.normpath(path.parent / file)
        for file in files
    ]
