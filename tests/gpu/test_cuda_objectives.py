"""Corruption on a GPU: the noise of the CPU, bit for bit, and its weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIGS = {
    "elbo": ObjectiveConfig(),
    "count": ObjectiveConfig(weighting="count"),
    "curricula": ObjectiveConfig(time_curriculum_steps=9, attention_annealing_steps=9),
    "hybrid": ObjectiveConfig(
        kind="hybrid",
        independent_noise_share=0.5,
        prompt_share=0.3,
        infilling_share=0.3,
        empty_token_share=0.3,
        pad_token_id=0,
    ),
    "dynamic": ObjectiveConfig(
        kind="hybrid", noise_type="time", uniform_probability=0.2, weighting="dynamic"
    ),
    "block": ObjectiveConfig(kind="block", block_size=5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_corruption_is_that_of_the_cpu(name: str) -> None:
    objective = build_objective(
        CONFIGS[name], vocab_size=37, mask_token_id=36, batch_size=8, training=True
    )
    tokens = torch.randint(0, 36, (8, 301), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, 200:] = False
    batch = TokenBatch(tokens, valid, torch.arange(24, 32))
    given = batch, batch.to("cuda")
    here, there = (objective.prepare(one, 11, Stream.TRAINING) for one in given)
    for field in dataclasses.fields(here):
        theirs, ours = getattr(there, field.name).cpu(), getattr(here, field.name)
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    masks = [objective.attention_mask(one, 11, Stream.TRAINING) for one in given]
    assert (masks[0] is None) == (masks[1] is None)
    if masks[0] is not None and masks[1] is not None:
        assert torch.equal(masks[0], masks[1].cpu())
