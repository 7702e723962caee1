"""The audit of what is installed, on this environment and on small ones that are wrong."""

from __future__ import annotations

import base64
import hashlib
import runpy
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from sources import ROOT

TOOL = ROOT / "tools" / "audit_dependencies.py"
WHEEL = "Wheel-Version: 1.0\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def install(site: Path, name: str, version: str, content: str) -> Path:
    """A package of one module, as an installer leaves it."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    module = site / f"{name}.py"
    module.write_text(content)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "WHEEL").write_text(WHEEL)
    rows = []
    for file in (module, folder / "METADATA", folder / "WHEEL"):
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=")
        path = file.relative_to(site).as_posix()
        rows.append(f"{path},sha256={digest.decode()},{file.stat().st_size}")
    added = f"{folder.name}/RECORD,,\n{folder.name}/INSTALLER,sha256=abc,3\n"
    (folder / "RECORD").write_text("\n".join(rows) + "\n" + added)
    return module


def found(audit: dict[str, Any], site: Path, requirements: Path) -> list[str]:
    packages = audit["read_installed"](distributions(path=[str(site)]))
    return list(audit["problems"](packages, requirements))


def test_this_environment_is_as_pinned() -> None:
    answer = subprocess.run(
        [sys.executable, TOOL], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("audit: ")
    assert " pinned packages are installed, " in answer.stdout


def test_other_versions_other_wheels_and_changed_files(
    audit: dict[str, Any], tmp_path: Path
) -> None:
    site, requirements = tmp_path / "site", tmp_path / "requirements"
    requirements.mkdir()
    module = install(site, "thing", "1.2+cpu", "answer = 42\n")
    (requirements / "cpu.txt").write_text(
        '-c dev.txt\nThing==1.2\nother==3; python_version < "3"\n'
    )
    packages = audit["read_installed"](distributions(path=[str(site)]))
    assert found(audit, site, requirements) == []
    audit["_write"](packages, requirements)
    assert "\nthing==1.2+cpu py3-none-any " in (requirements / "hashes.txt").read_text()
    assert found(audit, site, requirements) == []

    module.write_text("answer = 43\n")
    assert found(audit, site, requirements) == [
        f"thing: {module} was changed after it was installed"
    ]
    module.unlink()
    assert found(audit, site, requirements) == [f"thing: {module} is missing"]

    other = tmp_path / "other"  # the same version, consistent in itself, of another wheel
    install(other, "thing", "1.2+cpu", "answer = 43\n")
    assert found(audit, other, requirements) == [
        "thing==1.2+cpu py3-none-any installed other files than the pinned wheel"
    ]
    newer = tmp_path / "newer"
    install(newer, "thing", "1.3", "answer = 42\n")
    assert found(audit, newer, requirements) == ["thing 1.3 is installed, 1.2 is pinned"]


@pytest.mark.parametrize(
    ("script", "num_found", "said"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, "knows no weakness"),
        (
            "echo 'thing 1.2 PYSEC-1'; echo 'Found 1 known vulnerability in 1 package' >&2; exit 1",
            1,
            "found weaknesses",
        ),
        ("echo 'ConnectionError: no route' >&2; exit 1", 0, "could not ask its database (Conn"),
    ],
)
def test_pip_audit_is_asked_where_it_is_there(
    script: str,
    num_found: int,
    said: str,
    audit: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path / "site", "thing", "1.2", "")
    packages = audit["read_installed"](distributions(path=[str(tmp_path / "site")]))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fake = tmp_path / "pip-audit"
    fake.write_text(f'#!/bin/sh\ngrep -q "^thing==1.2$" "$6" || exit 9\n{script}\n')
    fake.chmod(0o755)
    weaknesses, message = audit["known_weaknesses"](packages)
    assert len(weaknesses) == num_found
    assert said in message
