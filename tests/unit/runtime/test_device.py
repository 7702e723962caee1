"""Which device is chosen, what is refused, and what choosing one costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_dlm.runtime.device import choose_device, open_device

HAS_GPU = choose_device("auto").type == "cuda"


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu").type == "cpu"
    assert open_device("cpu").torch_device.type == "cpu"


@pytest.mark.skipif(HAS_GPU, reason="has a GPU")
def test_without_a_gpu() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"^device is cuda but torch sees no GPU; use device cpu"):
        choose_device("cuda")
    with pytest.raises(
        ValueError, match=r"^train\.device is cuda but torch sees no GPU; use train"
    ):
        open_device("cuda")


def test_models_out_of_training_import_no_megatron() -> None:
    """It takes seconds to import, and its adapter changes names of torch."""
    code = (
        "import sys; import megatron_dlm.generation.generate, megatron_dlm.evaluation.evaluate; "
        "from megatron_dlm.runtime.device import choose_device; choose_device('auto'); "
        "print(any(name.startswith('megatron.') for name in sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
