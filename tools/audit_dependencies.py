#!/usr/bin/env python3
"""Whether what is installed is what the tests ran with: versions, files, and known weaknesses.

    python tools/audit_dependencies.py            exit status 1 and a line for each problem
    python tools/audit_dependencies.py --write    pin what is installed now, in hashes.txt

Every package of requirements/*.txt that is installed must have the pinned version, its wheel must
have installed the pinned files (requirements/hashes.txt, a line for each wheel), and they must not
have changed since. Where pip-audit is installed and reaches its database it is asked as well.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
HASHES_NAME = "hashes.txt"
# Files that the installer adds or writes anew.
_ADDED = re.compile(r"^\.\./|\.pyc$|\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json)$")
# Facts about a wheel differ where it was built here, from sources; its code does not.
_FACTS = ".dist-info/"
_PIP_AUDIT_SECONDS = 60


@dataclass(frozen=True)
class Installed:
    """A package that is installed."""

    name: str
    version: str
    tag: str
    """Of the wheel: interpreter, ABI and platform."""
    digest: str
    """SHA-256 of the names and sums of all files of the wheel."""
    files: tuple[tuple[Path, str], ...]
    """Each file and its SHA-256 as RECORD writes it."""

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version} {self.tag}"

    def has_version(self, pinned: str | None) -> bool:
        """Builds of one version, such as +cpu, are alike to a pin."""
        return pinned in (self.version, self.version.partition("+")[0])


def read_installed(found: Iterable[Distribution]) -> dict[str, Installed]:
    """Canonical name -> package, for all that came as wheels."""
    packages: dict[str, Installed] = {}
    for distribution in found:
        record, wheel = distribution.read_text("RECORD"), distribution.read_text("WHEEL")
        if record is None or wheel is None:
            continue
        name = canonicalize_name(distribution.metadata["Name"])
        rows = [row for row in csv.reader(record.splitlines()) if len(row) == 3 and row[1]]
        rows = sorted(row for row in rows if not _ADDED.search(row[0]))
        text = "\n".join(f"{path},{sum_}" for path, sum_, _ in rows if _FACTS not in path)
        packages[name] = Installed(
            name,
            distribution.version,
            ".".join(sorted(re.findall(r"^Tag: (\S+)", wheel, re.MULTILINE))),
            hashlib.sha256(text.encode()).hexdigest(),
            tuple((Path(str(distribution.locate_file(row[0]))), row[1]) for row in rows),
        )
    return packages


def pinned_versions(folder: Path) -> dict[str, str]:
    """Canonical name -> version, of the pins that hold for this interpreter."""
    pins: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt")):
        for line in file.read_text().splitlines() if file.name != HASHES_NAME else []:
            text = line.partition("#")[0].strip()
            if not text or text.startswith("-"):
                continue
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                (specifier,) = requirement.specifier
                pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def problems(packages: dict[str, Installed], folder: Path) -> Iterator[str]:
    """What is not as pinned, a line each."""
    pins, hashes = pinned_versions(folder), _read_hashes(folder)
    for name, version in pins.items():
        package = packages.get(name)
        if package is None:
            continue
        if not package.has_version(version):
            yield f"{name} {package.version} is installed, {version} is pinned"
        elif hashes.get(package.pin, package.digest) != package.digest:
            yield f"{package.pin} installed other files than the pinned wheel"
    chosen = [package for name, package in packages.items() if name in pins]
    with ThreadPoolExecutor() as pool:
        for found in pool.map(_changed_files, chosen):
            yield from found


def _read_hashes(folder: Path) -> dict[str, str]:
    path = folder / HASHES_NAME
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
    return {pin: digest for pin, _, digest in pairs}


def _changed_files(package: Installed) -> list[str]:
    changed = []
    for path, expected in package.files:
        algorithm, _, value = expected.partition("=")
        try:
            digest = _digest(path, algorithm)
        except FileNotFoundError:
            changed.append(f"{package.name}: {path} is missing")
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != value:
            changed.append(f"{package.name}: {path} was changed after it was installed")
    return changed


def _digest(path: Path, algorithm: str) -> bytes:
    digest = hashlib.new(algorithm)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()


def known_weaknesses(packages: dict[str, Installed]) -> tuple[list[str], str]:
    """(what pip-audit found, what it did); it finds nothing where it cannot ask."""
    command = shutil.which("pip-audit", path=None)
    if command is None:
        return [], "pip-audit is not installed: known weaknesses were not looked up"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("".join(f"{p.name}=={p.version}\n" for p in packages.values()))
        listed.flush()
        arguments = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", listed.name]
        try:
            answer = subprocess.run(
                [command, *arguments],
                capture_output=True,
                text=True,
                timeout=_PIP_AUDIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], f"pip-audit gave no answer in {_PIP_AUDIT_SECONDS} s"
    if answer.returncode == 0:
        return [], "pip-audit knows no weakness"
    if re.search(r"Found \d+ known vulnerabilit", answer.stderr):
        return answer.stdout.splitlines(), "pip-audit found weaknesses"
    last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    return [], f"pip-audit could not ask its database ({last})"


def _write(packages: dict[str, Installed], folder: Path) -> None:
    """Add the wheels of this environment; those of other interpreters and platforms stay."""
    pins = pinned_versions(folder)
    known = _read_hashes(folder)
    known |= {p.pin: p.digest for name, p in packages.items() if p.has_version(pins.get(name))}
    lines = [
        "# Of each wheel that the tests ran with: SHA-256 over the names and sums of its files.",
        "# Written by tools/audit_dependencies.py --write; checked in CI.",
        *(f"{pin} {digest}" for pin, digest in sorted(known.items())),
    ]
    (folder / HASHES_NAME).write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="pin what is installed now")
    parser.add_argument("--requirements", type=Path, default=REQUIREMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    packages = read_installed(distributions())
    if arguments.write:
        _write(packages, arguments.requirements)
    found = list(problems(packages, arguments.requirements))
    weaknesses, said = known_weaknesses(packages)
    for line in [*found, *weaknesses]:
        print(f"audit: {line}", file=sys.stderr)
    pins, hashes = pinned_versions(arguments.requirements), _read_hashes(arguments.requirements)
    checked = [packages[name] for name in pins if name in packages]
    num_hashed = sum(package.pin in hashes for package in checked)
    print(
        f"audit: {len(checked)} of {len(pins)} pinned packages are installed, {num_hashed} of them "
        f"with a pinned hash for this platform; {said}"
    )
    return 1 if found or weaknesses else 0


if __name__ == "__main__":
    raise SystemExit(main())
