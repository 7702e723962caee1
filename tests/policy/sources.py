"""Where the sources are, and their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_dlm"
TRAVELLING_CODE = "megatron_dlm/hf/remote_code/"


@cache
def tree_of(path: Path) -> ast.Module:
    """Syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """Path inside the repository, as the exception lists spell it."""
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth.

    Relative imports are for code that travels without the package; they keep their dot.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            is_travelling = name_of(path).startswith(TRAVELLING_CODE)
            assert node.level <= is_travelling, f"{name_of(path)}: relative import"
            dot = "." * node.level
            yield from (f"{dot}{node.module}.{alias.name}" for alias in node.names)
