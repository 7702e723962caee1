"""Packed documents on a GPU: our own core attention, and Transformer Engine if installed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from test_packed_documents import MODELS, PATTERNS, make_batch, run_model

from megatron_dlm.config.objective import ObjectiveConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


# Mean differences of logits with a standard deviation near one; what documents change is 0.8.
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.attention.value)
@pytest.mark.parametrize(
    ("implementation", "precision", "tolerance"), [("local", "fp32", 1e-4), ("auto", "bf16", 0.03)]
)
def test_documents_run_as_if_alone(
    implementation: str, precision: str, tolerance: float, pattern: ObjectiveConfig
) -> None:
    model = MODELS["grouped queries, normalised"]
    model = dataclasses.replace(model, transformer_impl=implementation)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        packed, alone, crossing = (
            run_model(model, pattern, make_batch(), how, device="cuda", precision=precision).logits
            for how in ("packed", "alone", "crossing")
        )
    finally:
        dist.destroy_process_group()
    assert (packed - alone).abs().mean() < tolerance
    assert (packed - crossing).abs().mean() > 0.1
