"""The dotted keys of a configuration class, their types in words, and what a misspelt key meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def leaf_types(config_class: type) -> dict[str, Any]:
    """Dotted key -> annotated type of every value that can be set."""
    hints = get_type_hints(config_class)
    leaves: dict[str, Any] = {}
    for item in fields(config_class):
        annotation = hints[item.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            inner = leaf_types(annotation)
            leaves.update({f"{item.name}.{name}": kind for name, kind in inner.items()})
        else:
            leaves[item.name] = annotation
    return leaves


def is_list(annotation: Any) -> bool:
    """Whether the value is a list."""
    return get_origin(annotation) is list


def is_whole(annotation: Any) -> bool:
    """Whether the value is an integer, and may not be another number."""
    members = (annotation, *get_args(annotation))
    return int in members and float not in members


def is_mapping(annotation: Any) -> bool:
    """Whether the value is a mapping with keys of the user's own."""
    return get_origin(annotation) is dict


def admits_nothing(annotation: Any) -> bool:
    """Whether the value may be null."""
    return type(None) in get_args(annotation)


def in_words(annotation: Any) -> str:
    """What a value of this type looks like, for an error message."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(member) for member in arguments)
    if origin is list:
        return f"a list, each item {in_words(arguments[0])}"
    if origin is dict:
        return f"a mapping of {in_words(arguments[0])} to {in_words(arguments[1])}"
    return _WORDS.get(annotation, str(annotation))


def suggestion(name: str, choices: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no choice is close."""
    known = list(choices)
    # The right field under the wrong section first: its whole key is far, its last word is not.
    last_words = {choice.rsplit(".", 1)[-1]: choice for choice in reversed(known)}
    last_word = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    if not close and "." in name and last_word in last_words:
        close = [last_words[last_word]]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        near = difflib.get_close_matches(last_word, last_words, n=1, cutoff=0.6)
        close = [last_words[word] for word in near]
    return f"; did you mean {close[0]}?" if close else ""


def flatten(
    values: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Dotted key -> value of a nested mapping; sections are opened, mapping values are not."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = any(leaf.startswith(f"{key}.") for leaf in leaves)
        if is_section and isinstance(value, Mapping):
            flat.update(flatten(value, leaves, f"{key}."))
        else:
            flat[key] = value
    return flat


def check_keys(flat: Mapping[str, Any], leaves: Mapping[str, Any], source: str) -> None:
    """Refuse keys that the configuration does not have."""
    sections = {leaf.rsplit(".", 1)[0] for leaf in leaves if "." in leaf}
    for key, value in flat.items():
        if key in sections:
            shown = "empty" if value is None else repr(value)
            raise ValueError(f"{source}: section {key} is {shown}; give it keys or remove it")
        if key not in leaves:
            raise ValueError(f"{source}: unknown key {key}{suggestion(key, leaves)}")
        if value is None and not admits_nothing(leaves[key]):
            raise ValueError(f"{source}: {key} is null; expected {in_words(leaves[key])}")
