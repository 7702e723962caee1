"""Peak memory on CPU is that of the process, in bytes."""

from __future__ import annotations

import torch

from megatron_dlm.runtime.device import open_device
from megatron_dlm.runtime.memory import peak_memory_bytes


def test_it_grows_with_what_is_held():
    device = open_device("cpu")
    before = peak_memory_bytes(device)
    held = torch.ones(before // 4 + 25_000_000)  # fp32: more than all that was ever held
    assert peak_memory_bytes(device) > max(before, held.nbytes)
    del held
    assert peak_memory_bytes(device) > before  # the peak stays
