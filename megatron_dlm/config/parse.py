"""From command line and YAML files to a checked configuration, and back.

The only importer of jsonargparse.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_dlm.config.keys import (
    check_keys,
    flatten,
    in_words,
    is_list,
    is_mapping,
    is_whole,
    leaf_types,
    suggestion,
)
from megatron_dlm.config.strict_yaml import parse_yaml

T = TypeVar("T")

PRESETS = Path(__file__).parent / "presets"
_PRESET_PREFIX = "preset:"
_POWER_OF_TEN = re.compile(r"\d+(\.\d+)?[eE]\+?\d{1,2}")
_OWN_FLAGS = ("config", "help", "print_config")


class _ConfigFile(NamedTuple):
    """One --config as the user named it, where it lies, and its values by dotted key."""

    name: str
    path: Path
    values: dict[str, Any]


def parse(config_class: type[T], argv: Sequence[str], prog: str) -> T:
    """Later sources win: defaults < --config files in order < --section.key flags.

    A mapping such as `data.train` is replaced as a whole by the later source. Raises ValueError
    with a one-line message that names the key, the value and where it came from.
    """
    leaves = leaf_types(config_class)
    names, arguments = _split_config_arguments(argv)
    arguments = [_with_underscores(argument, leaves) for argument in arguments]
    arguments = _with_whole_numbers(arguments, leaves)
    if not {"-h", "--help"} & set(arguments):
        _check_flags(arguments, leaves)
    files = [_read_file(name, leaves) for name in names]
    arguments = _join_lists(arguments, leaves)
    parser = _build_parser(config_class, prog)
    try:
        file_arguments = [f"--config={file.path}" for file in files if file.values]
        values = parser.parse_args([*file_arguments, *arguments])
    except argparse.ArgumentError as error:
        raise ValueError(_explain(error, leaves, files, arguments)) from None
    values.pop("config", None)
    return config_class(**parser.instantiate(values).as_dict())


class RepeatedParser(Generic[T]):
    """`parse` for many command lines of one class, such as the runs of a study.

    What they share is read once: a line costs milliseconds, where `parse` takes half a second.
    """

    def __init__(self, config_class: type[T], prog: str) -> None:
        self._class = config_class
        self._prog = prog
        self._leaves = leaf_types(config_class)
        self._parser = _build_parser(config_class, prog)
        self._defaults = vars(self._parser.get_defaults().as_flat())
        self._files: dict[str, dict[str, Any]] = {}

    def parse(self, argv: Sequence[str]) -> T:
        """What `parse` makes of these arguments; raises what it raises."""
        try:
            names, arguments = _split_config_arguments(argv)
            if all(word[2:].partition("=")[0] in self._leaves for word in arguments[::2]):
                values = dict(self._defaults)
                for name in names:
                    values.update(self._values_of_file(name))
                values.update(self._typed(_join_lists(arguments, self._leaves)))
                config: T = _instantiate(self._class, values)
                return config
        except (ValueError, argparse.ArgumentError):
            pass  # said below, with the name of key and file
        return parse(self._class, argv, self._prog)

    def _values_of_file(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            file = _read_file(name, self._leaves)
            self._files[name] = self._typed([f"--config={file.path}"]) if file.values else {}
        return self._files[name]

    def _typed(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Dotted key -> value of what these arguments name."""
        values = self._parser.parse_args(list(arguments), defaults=False).as_flat()
        return {key: value for key, value in vars(values).items() if key in self._leaves}


def _instantiate(config_class: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass with the values of its leaves, sections included."""
    hints = _hints(config_class)
    return config_class(
        **{
            item.name: _instantiate(hints[item.name], values, f"{prefix}{item.name}.")
            if is_dataclass(hints[item.name])
            else values[f"{prefix}{item.name}"]
            for item in fields(config_class)
        }
    )


_hints = cache(get_type_hints)


def dump(config: Any) -> str:
    """YAML that `parse` reads back to an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def keys_of_file(config_class: type, name: str) -> list[str]:
    """Dotted keys that a --config file sets; raises ValueError where `parse` would refuse it."""
    return list(_read_file(name, leaf_types(config_class)).values)


def preset_names() -> list[str]:
    """Names that `--config preset:NAME` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _build_parser(config_class: type, prog: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml | preset:NAME] [--key value ...]",
        description=config_class.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file; may be repeated, later ones win, flags win over all. For a run also "
        f"preset:NAME with NAME one of {', '.join(preset_names())}.",
    )
    parser.add_class_arguments(config_class, as_positional=False)
    return parser


def _split_config_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The --config values in order, and all other arguments."""
    names, others = [], []
    pending = iter(argv)
    for argument in pending:
        if argument == "--config":
            name = next(pending, None)
            if name is None:
                raise ValueError("--config needs a file name or preset:NAME")
            names.append(name)
        elif argument.startswith("--config="):
            names.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return names, others


def _locate(name: str) -> Path:
    if not name.startswith(_PRESET_PREFIX):
        return Path(name)
    preset = name[len(_PRESET_PREFIX) :]
    if preset not in preset_names():
        hint = suggestion(preset, preset_names())
        raise ValueError(
            f"--config {name}: no such preset{hint} (have: {', '.join(preset_names())})"
        )
    return PRESETS / f"{preset}.yaml"


def _read_file(name: str, leaves: dict[str, Any]) -> _ConfigFile:
    path = _locate(name)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {name}: cannot read the file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config {name}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"--config {name}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    except RecursionError:
        raise ValueError(f"--config {name}: nested too deeply to be a configuration") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {name}: expected sections such as `model:` at the top level")
    flat = flatten(values, leaves)
    check_keys(flat, leaves, f"--config {name}")
    return _ConfigFile(name, path, flat)


def _flag_name(argument: str) -> str:
    return argument[2:].partition("=")[0].removesuffix("+")


def _with_underscores(argument: str, leaves: dict[str, Any]) -> str:
    """--unique-tokens is --unique_tokens: Megatron's own flags are written with dashes."""
    name = _flag_name(argument)
    written = name.replace("-", "_")
    is_meant = argument.startswith("--") and name not in leaves and written in leaves
    return argument.replace(name, written, 1) if is_meant else argument


def _with_whole_numbers(arguments: Sequence[str], leaves: dict[str, Any]) -> list[str]:
    """1e9 is 1000000000 where an integer is expected."""
    found: list[str] = []
    name = ""
    for argument in arguments:
        start, value = "", argument
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            start = f"--{name}{equals}"
        is_meant = _POWER_OF_TEN.fullmatch(value) and is_whole(leaves.get(name))
        number = Decimal(value) if is_meant else None
        is_integral = number is not None and number == number.to_integral_value()
        found.append(f"{start}{int(number)}" if number is not None and is_integral else argument)
    return found


def _check_flags(arguments: Sequence[str], leaves: dict[str, Any]) -> None:
    sections = {leaf.rsplit(".", 1)[0] for leaf in leaves if "." in leaf}
    mappings = tuple(f"{name}." for name, kind in leaves.items() if is_mapping(kind))
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        name = _flag_name(argument)
        known = name in leaves or name in sections or name in _OWN_FLAGS
        if not known and not name.startswith(mappings):
            hint = suggestion(name, leaves).replace("did you mean ", "did you mean --")
            raise ValueError(f"unknown flag --{name}{hint}")


def _join_lists(arguments: Sequence[str], leaves: dict[str, Any]) -> list[str]:
    """`--input a b --input c` -> `--input=["a", "b", "c"]` for fields that are lists."""
    others: list[str] = []
    items: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        if not argument.startswith("--"):
            (others if current is None else current).append(argument)
            continue
        name, has_value, value = argument[2:].partition("=")
        if is_list(leaves.get(name)):
            current = items.setdefault(name, [])
            current.extend([value] if has_value else [])
        else:
            current = None
            others.append(argument)
    return others + [f"--{name}={_as_list(values)}" for name, values in items.items()]


def _as_list(values: Sequence[str]) -> str:
    is_written_as_list = len(values) == 1 and values[0].startswith("[")
    return values[0] if is_written_as_list else json.dumps(list(values))


def _explain(
    error: argparse.ArgumentError,
    leaves: dict[str, Any],
    files: Sequence[_ConfigFile],
    arguments: Sequence[str],
) -> str:
    """One line from jsonargparse's message: origin, key, value, what was expected."""
    message = " ".join(str(error).split())
    missing = re.search(r"required: (.*)$", message)
    if missing:
        return f"{missing.group(1)} is missing; give it as a --flag or in a --config file"
    found = re.search(r'[Kk]ey "([\w.]+)"', message)
    key = found.group(1) if found else ""
    if key not in leaves:
        return message
    if any(argument.startswith("--") and _flag_name(argument) == key for argument in arguments):
        origin = f"--{key}"
    else:
        naming = [file.name for file in files if key in file.values]
        origin = f"--config {naming[-1]}: {key}" if naming else key
    value = re.search(r".*(?:Got|Given) value: (.*)$", message)  # the last is as it was given
    got = f" is {value.group(1)}" if value else ""
    return f"{origin}{got}; expected {in_words(leaves[key])}"
