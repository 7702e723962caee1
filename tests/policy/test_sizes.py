"""The size ratchet: what is over a limit is listed here, and the lists only shrink.

Complexity is ruff's C90 in pyproject.toml.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sources import name_of, python_files, tree_of

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL_PARAMETERS = 5
MAX_NESTING = 3

# name -> size now; shrink or delete, never add or grow.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS: dict[str, int] = {}
DEEP_FUNCTIONS: dict[str, int] = {}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)


def functions(path: Path) -> Iterator[tuple[str, _Function]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, _Function):
            yield f"{name_of(path)}:{node.name}", node


def positional_parameters(function: _Function) -> int:
    arguments = [*function.args.posonlyargs, *function.args.args]
    return len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls"))


def nesting(node: ast.AST, *, is_elif: bool = False) -> int:
    """Blocks inside blocks; an elif is no deeper than its if, an inner function starts anew."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, (_Function, ast.Lambda)) or not isinstance(child, ast.AST):
                continue
            elif_here = (
                isinstance(node, ast.If)
                and name == "orelse"
                and len(children) == 1
                and isinstance(child, ast.If)
            )
            deepest = max(deepest, nesting(child, is_elif=elif_here))
    return deepest + (isinstance(node, _BLOCKS) and not is_elif)


def largest(measure: Callable[[_Function], int]) -> dict[str, int]:
    """Name -> size over all functions; of two functions of one name in one file, the larger."""
    sizes: dict[str, int] = {}
    for path in CODE:
        for name, node in functions(path):
            sizes[name] = max(measure(node), sizes.get(name, 0))
    return sizes


def num_lines(function: _Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def depth(function: _Function) -> int:
    return max((nesting(statement) for statement in function.body), default=0)


CODE = python_files("megatron_dlm", "tools")
EVERYTHING = [*CODE, *python_files("tests", "examples")]


@pytest.mark.parametrize(
    ("sizes", "limit", "exceptions"),
    [
        (
            {name_of(path): len(path.read_text("utf-8").splitlines()) for path in EVERYTHING},
            MAX_FILE_LINES,
            LONG_FILES,
        ),
        (largest(num_lines), MAX_FUNCTION_LINES, LONG_FUNCTIONS),
        (largest(positional_parameters), MAX_POSITIONAL_PARAMETERS, MANY_PARAMETERS),
        (largest(depth), MAX_NESTING, DEEP_FUNCTIONS),
    ],
    ids=["file lines", "function lines", "positional parameters", "nesting"],
)
def test_size(sizes: dict[str, int], limit: int, exceptions: dict[str, int]) -> None:
    too_large = {name: size for name, size in sizes.items() if size > limit}
    assert too_large == exceptions  # equal, so that the list shrinks with the code


def test_nesting_is_measured() -> None:
    source = "if a:\n for b in c:\n  with d:\n   if e:\n    f()\n   elif g:\n    h()\n"
    assert nesting(ast.parse(source).body[0]) == 4
    assert nesting(ast.parse("if a: b\nelif c: d\nelif e: f").body[0]) == 1


def test_positional_parameters_are_measured() -> None:
    (function,) = ast.parse("def f(self, a, b=1, *, c, **d): pass").body
    assert isinstance(function, ast.FunctionDef)
    assert positional_parameters(function) == 2
