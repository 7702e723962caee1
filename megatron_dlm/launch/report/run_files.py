"""What the files of a run directory say; each of them may be missing, or broken by a crash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import yaml

from megatron_dlm.launch.report.curves import Table, read_tables
from megatron_dlm.training.events import EVENTS_FILE

_ONE_OF = ("config.yaml", "metrics.jsonl", "run.json")


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    time: datetime
    kind: str
    step: float | None
    details: Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """One run as its files tell it."""

    name: str
    """Unique among the runs of a report."""
    path: Path
    config_text: str
    config: Mapping[str, Any]
    """Dotted key -> value."""
    facts: Mapping[str, Any]
    """run.json"""
    status: Mapping[str, Any]
    """status.json"""
    events: Sequence[Event]
    tables: Sequence[Table]
    warnings: Sequence[str]
    """What could not be read, in words."""


def read_runs(directories: Sequence[str]) -> list[RunFiles]:
    """The runs in these directories; a ValueError names one that holds no run."""
    paths = [Path(directory) for directory in directories]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"run {path} is no directory; name the train.output_dir of a run")
        if not any((path / name).is_file() for name in _ONE_OF):
            raise ValueError(
                f"run {path} holds no run (none of {', '.join(_ONE_OF)}); name the "
                "train.output_dir of a run"
            )
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"run names the directory {paths[0]} more than once; name every run once")


def _read_run(path: Path, name: str) -> RunFiles:
    warnings: list[str] = []
    config_text, config = _read_config(path / "config.yaml", warnings)
    return RunFiles(
        name=name,
        path=path,
        config_text=config_text,
        config=config,
        facts=_read_object(path / "run.json", warnings),
        status=_read_object(path / "status.json", warnings, is_expected=False),
        events=_read_events(path / EVENTS_FILE, warnings),
        tables=_read_metrics(path / "metrics.jsonl", warnings),
        warnings=warnings,
    )


def _read_metrics(path: Path, warnings: list[str]) -> list[Table]:
    if not path.is_file():
        warnings.append("there is no metrics.jsonl: the run has reported nothing yet")
        return []
    tables, num_bad = read_tables(path)
    if num_bad:
        warnings.append(f"{num_bad} lines of metrics.jsonl are no entries and were left out")
    return tables


def _read_config(path: Path, warnings: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        warnings.append("there is no config.yaml")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        warnings.append(f"config.yaml is not valid YAML: {' '.join(str(error).split())}")
        return text, {}
    return text, dict(_flat(values)) if isinstance(values, dict) else {}


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _read_object(path: Path, warnings: list[str], *, is_expected: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if is_expected:
            warnings.append(f"there is no {path.name}")
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        warnings.append(f"{path.name} is not valid JSON: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _read_events(path: Path, warnings: list[str]) -> list[Event]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()  # empty, or half written
    found = [_event(line) for line in [*lines, last] if line.strip()]
    num_bad = found.count(None) - bool(last and found[-1] is None)
    if num_bad:
        warnings.append(f"{num_bad} lines of {path.name} are no events and were left out")
    return [event for event in found if event is not None]


def _event(line: bytes) -> Event | None:
    try:
        record = orjson.loads(line)
        time, kind = datetime.fromisoformat(record.pop("time")), record.pop("kind")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    step = record.pop("step", None)
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if not isinstance(kind, str) or time.tzinfo is None:
        return None
    return Event(time, kind, float(step) if is_number else None, record)
