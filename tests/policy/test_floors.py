"""Who may import whom: a module reaches strictly lower floors and its own folder, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sources import PACKAGE, ROOT, imported_modules, name_of, python_files

FLOORS = {
    "config": 1,
    "runtime": 2,
    "ops": 3,
    "models": 4,
    "data": 4,
    "objectives": 4,
    "checkpoint": 5,
    "training": 6,
    "hf": 7,
    "scaling": 7,
    "generation": 8,
    "evaluation": 9,
    "cli": 10,
    "launch": 10,
    "__main__": 11,
}
# These travel beside exported models, without the package but with each other.
ALONE = [
    "generation/samplers.py",
    "generation/masked_samplers.py",
    "generation/block_samplers.py",
    "generation/hybrid_noise.py",
    "generation/hybrid_samplers.py",
    "hf/remote_code",
]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def breaches(path: Path) -> list[str]:
    """Imports of the file that climb or go sideways."""
    here = part_of(path)
    found = []
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        there = rest.partition(".")[0]
        if package != "megatron_dlm" or there == here or there not in FLOORS:
            continue
        if here not in FLOORS or FLOORS[there] >= FLOORS[here]:
            found.append(f"{name_of(path)} imports {module}")
    return found


def test_imports_go_down() -> None:
    files = python_files("megatron_dlm")
    assert [breach for path in files for breach in breaches(path)] == []


def test_every_part_has_a_floor() -> None:
    parts = {part_of(path) for path in python_files("megatron_dlm")} - {"__init__"}
    assert parts <= FLOORS.keys()


def test_no_folder_without_a_purpose() -> None:
    names = {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("name", ALONE)
def test_exported_code_imports_nothing_of_the_package(name: str) -> None:
    path = PACKAGE / name
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    modules = {module for file in files for module in imported_modules(file)}
    # The exporter turns the import of one sampler file in the other into a relative one.
    siblings = tuple(f"megatron_dlm.generation.{Path(part).stem}." for part in ALONE)
    modules = {module for module in modules if not module.startswith((".", *siblings))}
    allowed = sys.stdlib_module_names | {"torch", "transformers"}
    outside = {module for module in modules if module.partition(".")[0] not in allowed}
    if path.suffix == ".py":
        assert files
        outside |= {module for module in modules if module.startswith("transformers")}
    assert outside == set()


def test_samplers_load_with_torch_alone() -> None:
    assert "megatron" not in loaded_by(["megatron_dlm.generation.samplers"])


@pytest.mark.parametrize("folder", ["config", "scaling"])
def test_no_torch_in(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    modules = [module.removesuffix(".__init__") for module in modules]
    assert len(modules) > 1
    assert loaded_by([*modules, "megatron_dlm.cli"]) & {"torch", "megatron"} == set()


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages that a fresh interpreter holds after importing the modules."""
    program = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    program += "print(*{name.partition('.')[0] for name in sys.modules})"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    ("library", "home"),
    [("jsonargparse", "config/parse.py"), ("sentencepiece", "data"), ("wandb", "training")],
)
def test_library_has_one_home(library: str, home: str) -> None:
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in python_files("megatron_dlm")
        if any(module.partition(".")[0] == library for module in imported_modules(path))
    ]
    assert [user for user in users if not user.startswith(home)] == []
