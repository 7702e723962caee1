"""The kinds of figures that a study file may declare, and the strict reading of `figures:`."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from megatron_dlm.config.keys import in_words, suggestion
from megatron_dlm.scaling.figures import crossover, curves, final, isoflop, noise_profile
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.results import Results

if TYPE_CHECKING:
    from megatron_dlm.scaling.study import Study

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


class Spec(Protocol):
    """The keys of one kind: a frozen dataclass whose __post_init__ refuses impossible values."""

    def check(self, study: Study) -> None:
        """Raise ValueError, without the name of the figure, for what the study does not have."""


Draw = Callable[[Any, Results, "Study", Path], Drawn]

KINDS: dict[str, tuple[type, Draw]] = {
    "crossover": (CrossoverSpec, crossover.draw),
    "curves": (curves.CurvesSpec, curves.draw),
    "final": (final.FinalSpec, final.draw),
    "isoflop": (isoflop.IsoflopSpec, isoflop.draw),
    "noise_profile": (noise_profile.NoiseProfileSpec, noise_profile.draw),
}
"""Kind -> its keys, and its function."""


def parse_figures(path: Path, declared: Any, study: Study) -> dict[str, Spec]:
    """Name -> keys of what `figures:` of a study file declares.

    Raises ValueError, which names the file, the figure and the key, for anything else.
    """
    if not isinstance(declared, dict):
        raise ValueError(
            f"{path}: figures is {declared!r}; expected names, each with kind: and its keys"
        )
    figures = {}
    for name, keys in declared.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{path}: figures has the name {name!r}; names become files: letters, digits, "
                "and _ . + - behind the first"
            )
        try:
            figures[name] = _parse_figure(keys, study)
        except ValueError as error:
            raise ValueError(f"{path}: figures.{name}: {error}") from None
    return figures


def draw_figure(name: str, spec: Spec, results: Results, study: Study, folder: Path) -> Drawn:
    """Draw one declared figure into the folder; errors name it."""
    draw = next(draw for kind, draw in KINDS.values() if type(spec) is kind)
    try:
        return draw(spec, results, study, folder / name).without_empty_columns()
    except ValueError as error:
        raise ValueError(f"figure {name}: {error}") from None


def _parse_figure(keys: Any, study: Study) -> Spec:
    if not isinstance(keys, dict) or "kind" not in keys:
        raise ValueError(f"expected kind: and its keys; kinds are {', '.join(KINDS)}")
    kind = keys["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        meant = suggestion(str(kind), KINDS)
        raise ValueError(f"unknown kind {kind}{meant} (have: {', '.join(KINDS)})")
    spec_class, _ = KINDS[kind]
    hints = get_type_hints(spec_class)
    values = {key: value for key, value in keys.items() if key != "kind"}
    for key, value in values.items():
        if key not in hints:
            meant = suggestion(str(key), hints)
            raise ValueError(f"kind {kind} has no key {key}{meant} (have: {', '.join(hints)})")
        values[key] = _checked(key, value, hints[key])
    for field in fields(spec_class):
        is_required = field.default is MISSING and field.default_factory is MISSING
        if is_required and field.name not in values:
            raise ValueError(f"{field.name} is missing; expected {_in_words(hints[field.name])}")
    spec: Spec = spec_class(**values)
    spec.check(study)
    return spec


def _checked(key: str, value: Any, annotation: Any) -> Any:
    """The value as the field holds it: a list becomes a tuple, a whole number a float."""
    try:
        return _as(value, annotation)
    except TypeError:
        raise ValueError(f"{key} is {value!r}; expected {_in_words(annotation)}") from None


def _as(value: Any, annotation: Any) -> Any:
    """Raises TypeError for a value that is none of the type."""
    origin: Any = get_origin(annotation)
    arguments = get_args(annotation)
    if origin in (Union, types.UnionType):
        return _as_one_of(value, arguments)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # one needs no brackets
        return tuple(_as(item, arguments[0]) for item in items)
    if origin is Mapping and isinstance(value, dict):
        return {_as(name, arguments[0]): _as(item, arguments[1]) for name, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if origin is None and _is_plain(value, annotation):
        return annotation(value) if annotation is float else value
    raise TypeError


def _as_one_of(value: Any, members: tuple[Any, ...]) -> Any:
    # Lists come last: 3 is 3 before it is a list of one.
    for member in sorted(members, key=_is_list):
        try:
            return _as(value, member)
        except TypeError:
            continue
    raise TypeError


def _is_list(annotation: Any) -> bool:
    origin: Any = get_origin(annotation)
    return origin is tuple


def _is_plain(value: Any, annotation: type) -> bool:
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if annotation is float and isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None  # YAML takes 1e-3 for text
    return isinstance(value, (int, float) if annotation is float else annotation)


def _in_words(annotation: Any) -> str:
    origin: Any = get_origin(annotation)
    arguments = get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(member) for member in arguments)
    if origin is tuple:
        return f"a list, each item {_in_words(arguments[0])}"
    if origin is Mapping:
        return f"a mapping of {_in_words(arguments[0])} to {_in_words(arguments[1])}"
    return in_words(annotation)
