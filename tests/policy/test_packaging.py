"""Makefile, CI entry and constraints say what they must."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from sources import PACKAGE, ROOT

TARGETS = {"quickstart", "test", "slow", "check", "bench", "study-toy", "clean"}


def test_makefile_has_exactly_the_targets_of_a_user() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.$()/-]+):(?!=)", text, re.MULTILINE))
    assert targets == TARGETS | {".PHONY", "$(READY)"}
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(phony.split()) == TARGETS


@pytest.mark.parametrize("python", ["3.9", "3.13"])
def test_makefile_refuses_other_pythons(python: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    version = python.replace(".", ", ")
    fake.write_text(
        f'#!{sys.executable}\nimport sys\nsys.version_info = ({version}, 0, "final", 0)\n'
        f'if "--version" in sys.argv:\n    print("Python {python}")\nelse:\n    exec(sys.argv[2])\n'
    )
    fake.chmod(0o755)
    answer = subprocess.run(
        ["make", "test", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert answer.returncode != 0
    assert f"is Python {python}; megatron-dlm needs Python 3.10, 3.11 or 3.12" in answer.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("status", [0, 2])
def test_ci_keeps_the_status_and_ends_with_the_summary(status: int, tmp_path: Path) -> None:
    summary = "=== 1 failed, 3 passed in 1.25s ==="
    fake = tmp_path / "make"
    fake.write_text(f"#!/bin/sh\necho called $*\necho '{summary}'\necho after >&2\nexit {status}\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    answer = subprocess.run(
        [ROOT / ".ci" / "run"], capture_output=True, text=True, env=environment, check=False
    )
    assert answer.returncode == status
    lines = answer.stdout.splitlines()
    assert lines[0] == "called test"
    assert lines[-1] == summary


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", told.update)
        runpy.run_path("setup.py")
    return told


def test_the_makefile_installs_every_extra_that_needs_no_gpu(package: dict[str, Any]) -> None:
    (extras,) = re.findall(r"-e '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())
    assert {*extras.split(",")} == {*package["extras_require"]} - {"te"}


def test_constraints_pin_all_that_is_installed(package: dict[str, Any]) -> None:
    """Direct dependencies, and what they pull in as far as this environment shows."""
    texts = [(ROOT / "requirements" / f"{name}.txt").read_text() for name in ("cpu", "dev")]
    pinned = {canonical(name) for name in re.findall(r"^([\w.-]+)==", "".join(texts), re.MULTILINE)}
    extras = package["extras_require"]
    direct = [*package["install_requires"]]
    direct += [entry for name in extras if name != "te" for entry in extras[name]]
    found = pulled_in(direct)
    assert {"megatron-core", "torch", "transformers", "lm-eval", "pytest"} <= found
    assert found <= pinned


def pulled_in(requirements: Iterable[str]) -> set[str]:
    """Their names, and those of all that they need here; torch brings its own GPU libraries."""
    found: set[str] = set()
    waiting = [Requirement(entry) for entry in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            needs = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = [*requirement.extras, ""]
        waiting += [
            need
            for need in needs
            if (need.marker is None or any(need.marker.evaluate({"extra": x}) for x in extras))
            and not (name == "torch" and re.match("nvidia|cuda|triton", need.name))
        ]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_files_that_are_no_python_are_packaged(package: dict[str, Any]) -> None:
    packaged = {
        path
        for folder, patterns in package["package_data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*folder.split(".")).glob(pattern)
    }
    found = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert packaged == {path for path in found if path.suffix != ".py"}
