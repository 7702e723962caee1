"""Makefile, CI entry and constraints say what they must."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import PACKAGE, ROOT

TARGETS = {"quickstart", "test", "slow", "check", "bench", "clean"}


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


def test_constraints_pin_every_direct_dependency() -> None:
    pins = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("cpu", "dev"))
    pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)}
    block = re.search(
        r"install_requires=\[(.*?)\n    \]", (ROOT / "setup.py").read_text(), re.DOTALL
    )
    assert block is not None
    direct = {name.lower() for name in re.findall(r'"([\w-]+)', block.group(1))}
    assert "megatron-core" in direct
    assert direct <= pinned


def test_presets_are_packaged() -> None:
    text = (ROOT / "setup.py").read_text()
    assert 'package_data={"megatron_dlm.config.presets": ["*.yaml"]}' in text
    assert list((PACKAGE / "config" / "presets").glob("*.yaml"))
