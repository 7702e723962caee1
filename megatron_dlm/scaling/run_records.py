"""What the files of one run say of it, read for the table of a study."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import orjson
import yaml

T = TypeVar("T")

Report = Mapping[str, Any]
"""A line of metrics.jsonl."""

# A section of config.yaml: its name and all lines up to the next one.
_SECTION = re.compile(r"^(\w+):.*\n(?:[ #-].*\n|\n)*", re.MULTILINE)
_TAIL_BYTES = 1 << 16  # several reports
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_reports(path: Path, split: str, warnings: list[str]) -> Iterator[Report]:
    """The whole lines of one split (valid, train or all); the last may still be being written."""
    if not path.is_file():
        return
    num_bad = 0
    # Most lines are of training: a line without the word is not even parsed.
    word = b"" if split == "all" else b'"%s"' % split.encode()
    for line in path.read_bytes().split(b"\n")[:-1]:
        if word not in line:
            continue
        report = _report(line)
        if report is None:
            num_bad += 1
        elif split in ("all", report["split"]):
            yield report
    if num_bad:
        warnings.append(
            f"{path.parent.name}: {num_bad} lines of {path.name} are no reports and were left out"
        )


def last_step(path: Path) -> int | None:
    """Of the last whole report in a metrics.jsonl; None where it has none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    reports = filter(None, map(_report, reversed(lines)))
    return next((report["step"] for report in reports), None)


def _report(line: bytes) -> Report | None:
    try:
        report = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_report = (
        isinstance(report, dict)
        and isinstance(report.get("split"), str)
        and type(report.get("step")) is int
    )
    return report if is_report else None


def read_facts(path: Path, warnings: list[str]) -> dict[str, Any]:
    """run.json; empty, with a warning, where it cannot be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        warnings.append(f"{path.parent.name}: cannot read {path.name}; its columns are empty")
        return {}
    return facts


def read_config(path: Path, sections: set[str], warnings: list[str]) -> dict[str, Any]:
    """These sections of a config.yaml; empty, with a warning, where it cannot be read."""
    try:
        return _read_sections(path.read_text(encoding="utf-8"), sections)
    except (OSError, ValueError, yaml.YAMLError):
        warnings.append(f"{path.parent.name}: cannot read {path.name}; its columns are empty")
        return {}


def settings_in(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value, of those keys that the configuration has."""
    found: dict[str, Any] = {}
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            found[key] = value
    return found


_ABSENT = object()


def section_from(section_class: type[T], values: Mapping[str, Any]) -> T:
    """A section of the configuration; TypeError or ValueError for what it cannot hold."""
    hints = get_type_hints(section_class)
    found = dict(values)
    for name, value in values.items():
        kind = hints.get(name)
        if is_dataclass(kind) and isinstance(kind, type):
            found[name] = section_from(kind, value)
    return section_class(**found)


def _read_sections(text: str, names: set[str]) -> dict[str, Any]:
    """Only these sections: reading all of a thousand configurations would take most of the time."""
    blocks = list(_SECTION.finditer(text))
    if not blocks:  # JSON is YAML too
        return _parsed(text)
    values: dict[str, Any] = {}
    for block in blocks:
        if block[1] in names:
            values.update(_parsed(block[0]))
    return values


@lru_cache(maxsize=512)
def _parsed(text: str) -> dict[str, Any]:
    """Runs of one study have most sections in common."""
    values = yaml.load(text, Loader=_SafeLoader)
    if not isinstance(values, dict):
        raise ValueError("no mapping")
    return values
