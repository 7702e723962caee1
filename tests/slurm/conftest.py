"""A Slurm for the session, and a source tree whose trainer needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import minislurm
import pytest
from minislurm import MiniSlurm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[MiniSlurm]:
    """Two nodes with 8 cores and 2 GPUs each; REQUIRE_SLURM=1 makes its absence a failure."""
    reason = minislurm.why_not()
    if reason is not None:
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(f"REQUIRE_SLURM is 1, but {reason}")
        pytest.skip(reason)
    cluster = MiniSlurm()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def on_slurm(slurm: MiniSlurm) -> Iterator[MiniSlurm]:
    """Our own commands, run in this process, talk to the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - slurm.environment.keys():
            patch.delenv(name)
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, slurm.environment[name])
        yield slurm


def copy_checkout(target: Path) -> Path:
    """A copy of the source tree in which training is the stub."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("megatron_dlm", "slurm"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    stub = Path(__file__).with_name("stub_entry.py")
    shutil.copy(stub, target / "megatron_dlm" / "training" / "entry.py")
    return target


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a copy, for all tests that do not edit it."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def own_checkout(tmp_path: Path) -> Path:
    """Such a copy, to edit."""
    return copy_checkout(tmp_path / "checkout")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What the daemons said goes into the report of a failure."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("slurm")
    if report.failed and isinstance(cluster, MiniSlurm):
        report.sections.append(("Slurm", cluster.logs()))
    return report
