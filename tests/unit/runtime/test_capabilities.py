"""What a machine is found to have, and a CPU run where GPU libraries are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.runtime.capabilities import NOTHING, Capabilities, has_apex
from megatron_dlm.runtime.determinism import use_deterministic_kernels

HOPPER = Capabilities((9, 0), (13, 0), "9.19.0", "2.11.0")


def test_one_line_names_all() -> None:
    assert NOTHING.describe() == "no GPU"
    assert HOPPER.describe() == (
        "compute capability 9.0, CUDA 13.0, cuDNN 9.19.0, Transformer Engine 2.11.0, "
        "flash-attn missing, Apex missing"
    )


@pytest.mark.parametrize(
    ("files", "is_nvidias"),
    [
        (["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"], True),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], False),
        (["apex/__init__.py", "amp_C.py"], False),
        ([], False),
    ],
    ids=["NVIDIA's", "without kernels", "another project", "none"],
)
def test_apex_is_nvidias(
    files: list[str], is_nvidias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "apex.optimizers", "amp_C"):  # a CPU run hides them
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert has_apex() is is_nvidias
    for name in ("apex", "apex.optimizers", "amp_C"):  # found, so imported as packages
        sys.modules.pop(name, None)


def test_a_run_on_the_cpu_does_not_import_them(tmp_path: Path) -> None:
    """Megatron Core would take Transformer Engine's optimizer for tensors on the CPU."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('no driver')")
    code = (
        "from megatron_dlm.runtime.device import open_device\n"
        "device = open_device('cpu')\n"
        "import megatron_dlm.training.optimizer, megatron_dlm.models.build\n"
        "print(device.has_transformer_engine)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
    )
    assert ended.stdout == "False\n", ended.stderr


def test_the_environment_may_not_forbid_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "Tree" if name == "NCCL_ALGO" else ":16:8")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(
        ValueError,
        match=r"^train\.deterministic needs NVTE_ALLOW_NONDETERMINISTIC_ALGO to be one of 0, but "
        r"the environment sets 1; unset it$",
    ):
        use_deterministic_kernels()
